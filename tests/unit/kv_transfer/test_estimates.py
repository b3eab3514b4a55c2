from __future__ import annotations

import pytest

from kv_transfer.estimates import (
    PRIOR_COSTS,
    CodecEstimates,
    ComputeEstimate,
    DecodeEstimates,
    Ratio,
)


def test_the_newest_sample_weighs_most_and_the_first_replaces_the_prior() -> None:
    ratio = Ratio(7.0)
    assert ratio.value == 7.0
    ratio.add(1.0, 2.0)
    assert ratio.value == 0.5
    for _ in range(20):
        ratio.add(2.0, 2.0)
    assert ratio.value == pytest.approx(1.0, abs=1e-3)
    ratio.add(5.0, 0.0)  # Says nothing.
    assert ratio.value == pytest.approx(1.0, abs=1e-3)


def test_costs_are_the_priors_until_something_is_measured() -> None:
    codecs, decode = CodecEstimates(), DecodeEstimates()
    assert codecs.cost("int8", decode) == PRIOR_COSTS["int8"]
    codecs.encoded("int8", 1_000, 550, 3e-6)
    cost = codecs.cost("int8", decode)
    assert (cost.ratio, cost.encode_s) == (0.55, pytest.approx(3e-9))
    assert cost.decode_s == PRIOR_COSTS["int8"].decode_s
    assert codecs.cost("of another release", decode).ratio == 0.5


def test_time_of_decoding_several_codecs_is_shared_as_expected() -> None:
    codecs, decode = CodecEstimates(), DecodeEstimates()
    decode.decoded({"raw": 1_000}, 1e-6, codecs)
    decode.decoded({"kv1": 1_000}, 3e-6, codecs)
    decode.decoded({"raw": 1_000, "kv1": 1_000}, 4e-6, codecs)
    assert decode.seconds("raw", 0.0) == pytest.approx(1e-9)
    assert decode.seconds("kv1", 0.0) == pytest.approx(3e-9)


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
