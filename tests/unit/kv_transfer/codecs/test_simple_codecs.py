"""Every codec that needs no profile: round trips, equal implementations, odd input, one section
without the others."""

from __future__ import annotations

import numpy as np
import pytest

from baton.protocol.errors import ConfigError, WireError
from kv_transfer.codecs.container import Form, header_for, max_stream_bytes, read_sections
from kv_transfer.codecs.contract import CodecError, Quality
from kv_transfer.codecs.float_values import widen_reference
from kv_transfer.codecs.registry import WITHOUT_PROFILE, make
from tests.support.kv_samples import (
    DTYPES,
    PART,
    Geometry,
    as_dtype,
    bits,
    kv_like,
    random_bits,
    sealed,
)

EXACT = ("raw", "split", "entropy")
LOSSY = ("int8", "fp8", "int4")
SHAPES = (
    (1, 1, 1, 1),
    (2, 3, 1, 1),
    (1, 1, 3, 5),
    (2, 65, 2, 16),
    (1, 300, 2, 33),
    (1, 6000, 1, 3),
)
"""Layers, tokens, heads, head_dim."""


def both(name, geometry):
    return make(name, geometry), make(name, geometry, "reference")


def decoded(codec, stream, kv):
    out = np.full_like(kv, 7)
    codec.decode(stream, PART, out)
    return out


def assert_same_everywhere(name, geometry, kv):
    """All implementations write the same stream and read the same values; returns both."""
    compiled, reference = both(name, geometry)
    stream = compiled.encode(kv, PART)
    assert bytes(stream) == bytes(reference.encode(kv, PART))
    assert len(stream) <= max_stream_bytes(len(kv), kv[0].nbytes)
    out = decoded(compiled, stream, kv)
    assert bits(out) == bits(decoded(reference, stream, kv))
    return stream, out


@pytest.mark.parametrize("name", WITHOUT_PROFILE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_implementations_agree_and_lossless_is_exact(name, dtype):
    for layers, tokens, heads, dim in SHAPES:
        geometry = Geometry(dtype, heads, dim)
        kv = kv_like(geometry, layers, tokens)
        _, out = assert_same_everywhere(name, geometry, kv)
        assert name in LOSSY or bits(out) == bits(kv)


@pytest.mark.parametrize("name", WITHOUT_PROFILE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_that_no_model_makes_survive(name, dtype):
    """NaN with payloads, infinities, subnormals, zeros of both signs: exact codecs keep them, and
    lossy ones send such a layer raw."""
    geometry = Geometry(dtype, 2, 16)
    kv = kv_like(geometry, 4, 40)
    kv[1] = random_bits(geometry, 1, 40, seed=2)[0]
    kv[2] = as_dtype(np.float32([0.0, -0.0]), dtype)[:, None, None, None]
    stream, out = assert_same_everywhere(name, geometry, kv)
    assert bits(out[1]) == bits(kv[1])
    assert bits(out[2]) == bits(kv[2]) or (
        name in LOSSY and not widen_reference(out[2], dtype).any()
    )
    if name in LOSSY:
        forms = [s.form for s in read_sections(stream, header_for(name, geometry, kv))]
        assert forms[1] == Form.RAW
        assert Form.CODED in forms


@pytest.mark.parametrize("name", EXACT)
def test_random_bits_do_not_grow(name):
    geometry = Geometry("bfloat16", 2, 16)
    kv = random_bits(geometry, 2, 100, seed=4)
    stream, out = assert_same_everywhere(name, geometry, kv)
    assert bits(out) == bits(kv)
    assert len(stream) <= kv.nbytes + 64


@pytest.mark.parametrize(
    ("name", "dtype", "most_bits"),
    [
        ("split", "bfloat16", 12.1),
        ("entropy", "bfloat16", 10.8),
        ("split", "float16", 14.9),
        ("entropy", "float16", 14.0),
        ("split", "float32", 28.1),
        ("entropy", "float32", 26.8),
        ("int8", "bfloat16", 8.6),
        ("fp8", "bfloat16", 8.1),
        ("int4", "bfloat16", 4.6),
    ],
)
def test_size(name, dtype, most_bits):
    geometry = Geometry(dtype, 2, 64)
    kv = kv_like(geometry, 2, 512)
    stream, _ = assert_same_everywhere(name, geometry, kv)
    assert len(stream) * 8 / kv.size < most_bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "levels"), [("int8", 255), ("int4", 15)])
def test_integers_are_within_half_a_step(name, levels, dtype):
    geometry = Geometry(dtype, 2, 16)
    kv = kv_like(geometry, 2, 100)
    _, out = assert_same_everywhere(name, geometry, kv)
    x, y = widen_reference(kv, dtype), widen_reference(out, dtype)
    for begin in range(0, 100, 64):
        group = x[:, :, begin : begin + 64]
        size = np.abs(group).max(axis=2, keepdims=True)
        step = np.maximum(np.ptp(group, axis=2, keepdims=True) / levels, size / 2**14) * (1 + 2**-7)
        # The zero is rounded too, and results round to the dtype.
        slack = step + size * 2.0**-8
        assert (np.abs(y[:, :, begin : begin + 64] - group) <= slack).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_is_within_a_sixteenth(dtype):
    geometry = Geometry(dtype, 2, 16)
    kv = kv_like(geometry, 2, 100)
    kv[1] = as_dtype(widen_reference(kv[1], dtype) * np.float32(300), dtype)
    _, out = assert_same_everywhere("fp8", geometry, kv)
    x, y = widen_reference(kv, dtype), widen_reference(out, dtype)
    tiny = np.abs(x).max(axis=(2, 3, 4), keepdims=True) / 2**17
    assert (np.abs(y - x) <= np.abs(x) / 16 + tiny).all()


def test_constant_channels_keep_their_value():
    geometry = Geometry("float32", 1, 8)
    kv = np.tile(np.float32([1e-30, -3.25, 1e6, 5, 0, -1e-9, 7e8, 2]), (1, 2, 64, 1)).reshape(
        1, 2, 64, 1, 8
    )
    for name in ("int8", "int4"):
        _, out = assert_same_everywhere(name, geometry, kv)
        assert np.allclose(out, kv, rtol=2**-14, atol=2**-99)


@pytest.mark.parametrize("name", WITHOUT_PROFILE)
def test_a_layer_is_coded_alike_whatever_is_beside_it(name):
    geometry = Geometry("bfloat16", 2, 16)
    kv = kv_like(geometry, 3, 70)
    codec = make(name, geometry)
    together = read_sections(codec.encode(kv, PART), header_for(name, geometry, kv))
    for index, section in enumerate(together):
        one = kv[index : index + 1]
        (alone,) = read_sections(codec.encode(one, PART), header_for(name, geometry, one))
        assert bytes(alone.data) == bytes(section.data)


@pytest.mark.parametrize("name", WITHOUT_PROFILE)
def test_streams_decode_from_any_address(name):
    """Messages begin where the transport put them."""
    geometry = Geometry("float32", 2, 16)
    kv = kv_like(geometry, 1, 70)
    codec = make(name, geometry)
    stream = bytes(codec.encode(kv, PART))
    first = decoded(codec, stream, kv)
    for offset in (1, 2, 3):
        moved = memoryview(bytes(offset) + stream)[offset:]
        assert bits(decoded(codec, moved, kv)) == bits(first)


@pytest.mark.parametrize("name", WITHOUT_PROFILE)
def test_a_stream_of_other_dims_is_refused(name):
    geometry = Geometry("bfloat16", 2, 16)
    codec = make(name, geometry)
    stream = codec.encode(kv_like(geometry, 1, 8), PART)
    with pytest.raises(WireError, match="num_tokens 8, expected 9"):
        codec.decode(stream, PART, kv_like(geometry, 1, 9))
    with pytest.raises(CodecError, match="dtype 'bfloat16', expected 'float16'"):
        make(name, Geometry("float16", 2, 16)).decode(stream, PART, kv_like(geometry, 1, 8))


@pytest.mark.parametrize("name", WITHOUT_PROFILE)
@pytest.mark.parametrize("section", [b"", b"\xff" * 11, b"\xff" * 64, bytes(64), bytes(40)])
def test_well_sealed_nonsense_is_refused(name, section):
    geometry = Geometry("bfloat16", 1, 8)
    out = kv_like(geometry, 1, 3)
    stream = sealed(header_for(name, geometry, out), [section])
    for codec in both(name, geometry):
        with pytest.raises(CodecError):
            codec.decode(stream, PART, out)


def test_qualities():
    geometry = Geometry("bfloat16", 1, 8)
    found = {name: make(name, geometry).quality for name in WITHOUT_PROFILE}
    assert [found[name] for name in EXACT] == [Quality.EXACT] * 3
    assert all(found[name] < Quality.LOSSLESS for name in LOSSY)
    assert Quality.LOW < Quality.MEDIUM < Quality.HIGH < Quality.LOSSLESS < Quality.EXACT


def test_an_unknown_name_is_told_with_the_known_ones():
    with pytest.raises(ConfigError, match="no KV codec 'zip'; there are raw, split"):
        make("zip", Geometry("bfloat16", 1, 8))
