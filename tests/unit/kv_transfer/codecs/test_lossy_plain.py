"""kv1 to kv4 of a model without a profile."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from kv_transfer.codecs import registry
from kv_transfer.codecs.contract import CodecError, Implementation, KvPart
from kv_transfer.codecs.lossy_plain import LEVELS, PlainLossyCodec
from tests.support.kv_profiles import Geometry, Source, to_float

IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "compiled")
PART = KvPart(0, 0, 200)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("level", LEVELS)
def test_every_value_comes_back_within_half_a_step(dtype: str, level: str) -> None:
    geometry = Geometry(dtype)
    kv = Source(geometry, 1, 1, 4).kv(200, seed=1)
    decoded = []
    for implementation in IMPLEMENTATIONS:
        codec = PlainLossyCodec(geometry, level, implementation)
        stream, out = codec.encode(kv, PART), np.empty_like(kv)
        codec.decode(stream, PART, out)
        decoded.append(out)
        assert len(stream) < kv.nbytes / 3
    assert (decoded[0] == decoded[1]).all()
    x, y = to_float(kv, dtype), to_float(decoded[0], dtype)
    # Steps are bfloat16 of deviations, and results are rounded to the dtype.
    bound = x.std(2, keepdims=True) * LEVELS[level][1] * 0.51 + np.abs(x) * 0.005 + 0.001
    assert (np.abs(x - y) <= bound).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [0x7F80, 0x7FC1, 0x7F7F])
def test_a_layer_that_cannot_be_rounded_goes_raw(
    value: int, implementation: Implementation
) -> None:
    kv = Source(Geometry(), 2, 1, 4).kv(200, seed=2)
    kv[0, 0, 3, 1, 2] = value
    codec, out = PlainLossyCodec(Geometry(), "kv2", implementation), np.empty_like(kv)
    codec.decode(codec.encode(kv, PART), PART, out)
    assert value == 0x7F7F or (out[0] == kv[0]).all()
    assert not (out[1] == kv[1]).all()


def test_a_channel_that_never_changes_comes_back_as_it_is() -> None:
    kv = Source(Geometry(), 1, 1, 4).kv(200, seed=3)
    kv[0, 1, :, 0, 5] = 0x4049
    codec, out = PlainLossyCodec(Geometry(), "kv4"), np.empty_like(kv)
    codec.decode(codec.encode(kv, PART), PART, out)
    assert (out[0, 1, :, 0, 5] == 0x4049).all()


def test_a_stream_cut_short_is_refused() -> None:
    kv = Source(Geometry(), 1, 1, 4).kv(200, seed=4)
    codec = PlainLossyCodec(Geometry(), "kv2")
    stream = bytes(codec.encode(kv, PART))
    for length in (0, 10, 100, len(stream) - 4):
        with pytest.raises(CodecError):
            codec.decode(stream[:length], PART, np.empty_like(kv))


def test_the_registry_warns_once_without_a_profile(caplog: pytest.LogCaptureFixture) -> None:
    registry._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for name in registry.LOSSY:
            assert registry.make(name, Geometry()).name == name
    assert [r.message.count("baton calibrate") for r in caplog.records] == [1]
