from __future__ import annotations

import pytest

from kv_transfer.estimates import (
    PRIOR_COSTS,
    CodecEstimates,
    ComputeEstimate,
    DecodeEstimates,
    Ratio,
)

MB = 1_000_000


def test_the_newest_sample_weighs_most_and_the_prior_hardly_anything() -> None:
    ratio = Ratio(7.0)
    assert ratio.value == 7.0
    ratio.add(0.5 * MB, MB)
    assert ratio.value == pytest.approx(0.5, rel=0.3)
    for _ in range(20):
        ratio.add(2.0 * MB, 2.0 * MB)
    assert ratio.value == pytest.approx(1.0, rel=0.05)
    before = ratio.value
    ratio.add(5.0, 0.0)  # Says nothing.
    assert ratio.value == before


def test_costs_are_the_priors_until_something_is_measured() -> None:
    codecs, decode = CodecEstimates(), DecodeEstimates()
    assert codecs.cost("int8", decode) == PRIOR_COSTS["int8"]
    codecs.encoded("int8", MB, 6 * MB // 10, 3e-3)
    cost = codecs.cost("int8", decode)
    assert cost.ratio == pytest.approx(0.6, rel=0.01)
    assert cost.encode_s == pytest.approx(3e-9, rel=0.02)
    assert cost.decode_s == PRIOR_COSTS["int8"].decode_s
    assert codecs.cost("of another release", decode).ratio == 0.5


def test_a_codec_that_was_slow_once_is_not_given_up_for_good() -> None:
    codecs, decode = CodecEstimates(), DecodeEstimates()
    codecs.encoded("kv1", MB, MB // 20, 1.0)
    decode.decoded({"kv1": MB}, 1.0, codecs)
    assert codecs.cost("kv1", decode).encode_s > 100 * PRIOR_COSTS["kv1"].encode_s
    for _ in range(2_000):
        codecs.encoded("raw", MB, MB, 3e-4)
        decode.decoded({"raw": MB}, 3e-4, codecs)
    cost = codecs.cost("kv1", decode)
    assert cost.encode_s == pytest.approx(PRIOR_COSTS["kv1"].encode_s, rel=0.01)
    assert cost.decode_s == pytest.approx(PRIOR_COSTS["kv1"].decode_s, rel=0.01)
    assert cost.ratio == pytest.approx(0.05, rel=0.01), "which no machine slows down"


def test_time_of_decoding_several_codecs_is_shared_as_expected() -> None:
    codecs, decode = CodecEstimates(), DecodeEstimates()
    decode.decoded({"raw": MB}, 1e-3, codecs)
    decode.decoded({"kv1": MB}, 4e-3, codecs)
    decode.decoded({"raw": MB, "kv1": MB}, 5e-3, codecs)
    assert decode.seconds("raw", 0.0) == pytest.approx(1e-9, rel=0.05)
    assert decode.seconds("kv1", 0.0) == pytest.approx(4e-9, rel=0.05)


def test_computing_is_fitted_in_tokens_and_in_what_they_look_back_at() -> None:
    def true(start: int, stop: int) -> float:
        return (stop - start) * 1e-4 + (stop * stop - start * start) / 2 * 4e-8

    compute = ComputeEstimate()
    assert compute.seconds(0, 100) == float("inf")
    assert compute.seconds(100, 100) == 0.0
    for start in (0, 512, 1_024, 1_536):
        compute.computed(start, start + 512, true(start, start + 512))
    assert compute.seconds(0, 512) == pytest.approx(true(0, 512), rel=0.01)
    assert compute.seconds(3_000, 3_840) == pytest.approx(true(3_000, 3_840), rel=0.01)


def test_computing_is_never_predicted_to_take_less_than_nothing() -> None:
    compute = ComputeEstimate()
    compute.computed(0, 512, 0.05)
    assert compute.seconds(0, 1_024) == pytest.approx(0.1)
    compute.computed(512, 1_024, 0.02)  # Noise: later tokens seem cheaper.
    assert 0.0 < compute.seconds(0, 64) < compute.seconds(0, 4_096)
