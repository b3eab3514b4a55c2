"""Any KV goes through any codec; any bytes are refused or decoded, in every implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kv_transfer.codecs import rans, rans_compiled
from kv_transfer.codecs.container import header_for, max_stream_bytes
from kv_transfer.codecs.contract import CodecError
from kv_transfer.codecs.rans_tables import read_tables, write_tables
from kv_transfer.codecs.registry import WITHOUT_PROFILE, Implementation, make
from tests.support.kv_samples import DTYPES, PART, Geometry, bits, kv_like, random_bits, sealed

FAST = settings(deadline=None, max_examples=60)
LOSSLESS = ("raw", "split", "entropy")


@st.composite
def any_kv(draw: st.DrawFn) -> tuple[Geometry, NDArray[Any]]:
    """Model-like, any bits, or model-like with some of any bits among it."""
    geometry = Geometry(
        draw(st.sampled_from(DTYPES)), draw(st.integers(1, 4)), draw(st.integers(1, 40))
    )
    layers, tokens, seed = draw(st.integers(1, 3)), draw(st.integers(1, 90)), draw(st.integers(0))
    plain = kv_like(geometry, layers, tokens, seed)
    wild = random_bits(geometry, layers, tokens, seed)
    share = draw(st.sampled_from([0.0, 0.0, 0.01, 1.0]))
    is_wild = np.random.default_rng(seed).random(plain.shape) < share
    # By bits: assigning a signalling NaN as a float would make it a quiet one.
    kind = np.uint32 if plain.dtype.itemsize == 4 else np.uint16
    return geometry, np.where(is_wild, wild.view(kind), plain.view(kind)).view(plain.dtype)


@FAST
@given(any_kv(), st.sampled_from(WITHOUT_PROFILE))
def test_all_implementations_agree_and_lossless_is_exact(
    sample: tuple[Geometry, NDArray[Any]], name: str
) -> None:
    geometry, kv = sample
    kinds: tuple[Implementation, ...] = ("compiled", "reference")
    codecs = [make(name, geometry, kind) for kind in kinds]
    streams = [bytes(codec.encode(kv, PART)) for codec in codecs]
    assert streams[0] == streams[1]
    assert len(streams[0]) <= max_stream_bytes(len(kv), kv[0].nbytes)
    found = []
    for codec in codecs:
        out = np.empty_like(kv)
        codec.decode(streams[0], PART, out)
        found.append(bits(out))
    assert found[0] == found[1]
    assert name not in LOSSLESS or found[0] == bits(kv)


@FAST
@given(
    any_kv(),
    st.sampled_from(WITHOUT_PROFILE),
    st.sampled_from(["compiled", "reference"]),
    st.binary(max_size=600),
)
def test_any_sealed_bytes_are_refused_or_decoded(
    sample: tuple[Geometry, NDArray[Any]], name: str, kind: Implementation, data: bytes
) -> None:
    geometry, kv = sample
    header = header_for(name, geometry, kv)
    stream = sealed(header, [data[: header.layer_bytes]] * len(kv))
    try:
        make(name, geometry, kind).decode(stream, PART, kv)
    except CodecError:
        return
    assert name != "raw"


@FAST
@given(any_kv(), st.sampled_from(WITHOUT_PROFILE), st.data())
def test_a_stream_cut_anywhere_is_refused(
    sample: tuple[Geometry, NDArray[Any]], name: str, data: st.DataObject
) -> None:
    geometry, kv = sample
    codec = make(name, geometry)
    stream = bytes(codec.encode(kv, PART))
    end = data.draw(st.integers(0, len(stream) - 1))
    with pytest.raises(CodecError):
        codec.decode(stream[:end], PART, kv)


@FAST
@given(st.binary(max_size=200), st.integers(0, 400), st.sampled_from([1, 2, 8, 64]))
@example(b"", 0, 1)
def test_any_bytes_as_a_rans_stream(data: bytes, num_symbols: int, num_lanes: int) -> None:
    """Both decoders take or refuse the same streams, and get the same symbols from them."""
    tables = rans.RansTables(rans.normalise(np.array([[5, 0, 1, 2000], [1, 1, 1, 1]])))
    index = np.array([0, 1, 1], np.uint8)
    coded = np.frombuffer(data, np.uint8)
    results: list[bytes | None] = []
    for decode in (rans.decode_reference, rans_compiled.decode):
        out = np.zeros(num_symbols, np.uint8)
        try:
            decode(coded, index, tables, num_lanes, out)
            results.append(bytes(out))
        except CodecError:
            results.append(None)
    assert results[0] == results[1]


@FAST
@given(
    st.lists(st.lists(st.integers(0, 10**6), min_size=256, max_size=256), min_size=1, max_size=3)
)
def test_tables_of_frequencies_come_back(counts: list[list[int]]) -> None:
    array = np.array(counts)
    array[:, 7] += 1
    freqs = rans.normalise(array)
    written = write_tables(freqs)
    assert (read_tables(np.frombuffer(written, np.uint8), len(freqs)) == freqs).all()
    with pytest.raises(CodecError):
        read_tables(np.frombuffer(written[:-1], np.uint8), len(freqs))


@FAST
@given(st.binary(max_size=300), st.integers(1, 8))
def test_any_bytes_as_tables(data: bytes, num_tables: int) -> None:
    try:
        rans.RansTables(read_tables(np.frombuffer(data, np.uint8), num_tables))
    except CodecError:
        return
