"""rANS: reference and compiled agree, sizes come near the entropy, damage is an error."""

from __future__ import annotations

import numpy as np
import pytest

from kv_transfer.codecs import rans, rans_compiled
from kv_transfer.codecs.contract import CodecError

RNG = np.random.default_rng(3)


def some_tables(num_tables: int = 5, alphabet: int = 12) -> rans.RansTables:
    """Sharper from one to the next; in each two symbols that cannot be coded."""
    distance = np.abs(np.arange(alphabet) - alphabet // 2)
    counts = 1e6 * np.exp(-distance * (0.1 + np.arange(num_tables)[:, None]))
    counts[:, [0, alphabet - 1]] = 0
    return rans.RansTables(rans.normalise(np.maximum(np.rint(counts), counts > 0)))


def drawn(tables: rans.RansTables, index: rans.U8, num_symbols: int, seed: int = 1) -> rans.U8:
    """Symbols as often as their tables say."""
    rows = np.resize(index, num_symbols)
    slots = np.random.default_rng(seed).integers(0, rans.PROB_SCALE, num_symbols)
    return tables.symbol_of[rows, slots]


@pytest.mark.parametrize("num_lanes", [1, 4, 32, 1024])
@pytest.mark.parametrize("num_symbols", [0, 1, 31, 32, 33, 1000, 5000])
def test_both_implementations_write_the_same_and_read_it_back(num_lanes, num_symbols):
    tables, index = some_tables(), np.array([0, 4, 1, 1, 3, 2, 0], np.uint8)
    symbols = drawn(tables, index, num_symbols)
    coded = rans.encode_reference(symbols, index, tables, num_lanes)
    assert rans_compiled.encode(symbols, index, tables, num_lanes).tobytes() == coded.tobytes()
    assert len(coded) <= rans.max_coded_bytes(num_symbols, num_lanes)
    for decode in (rans.decode_reference, rans_compiled.decode):
        out = np.full_like(symbols, 255)
        decode(coded, index, tables, num_lanes, out)
        assert out.tobytes() == symbols.tobytes()


def test_the_stream_is_the_documented_one():
    """One lane, worked by hand: x = 65536, f = 1, c = 3: x >= 1 << 20 is false, so
    x = (65536 << 12) + 3; again: x >= 1 << 20, so its low half goes out, and so on."""
    tables = rans.RansTables(np.array([[3, 1, 4092]]))
    coded = rans_compiled.encode(np.array([1, 1], np.uint8), np.zeros(1, np.uint8), tables, 1)
    once = (65536 << 12) + 3
    word, rest = once & 0xFFFF, once >> 16
    twice = (rest << 12) + 3
    assert coded.tobytes() == word.to_bytes(2, "little") + twice.to_bytes(4, "little")


def test_size_comes_near_the_entropy():
    tables, index = some_tables(), np.arange(5, dtype=np.uint8)
    symbols = drawn(tables, index, 200_000)
    num_lanes = rans.lanes_for(len(symbols))
    coded = rans_compiled.encode(symbols, index, tables, num_lanes)
    bits = tables.bits()[np.resize(index, len(symbols)), symbols].sum()
    assert num_lanes == 32
    assert len(coded) * 8 <= bits * 1.001 + num_lanes * 26


@pytest.mark.parametrize("encode", [rans.encode_reference, rans_compiled.encode])
def test_a_symbol_without_a_frequency_is_refused(encode):
    with pytest.raises(ValueError, match="frequency 0"):
        encode(np.array([3, 0, 3], np.uint8), np.zeros(1, np.uint8), some_tables(), 1)


@pytest.mark.parametrize("decode", [rans.decode_reference, rans_compiled.decode])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda c: c[:3], "stream of 3 bytes"),
        (lambda c: c[:-1], "stream of"),
        (lambda c: c[2:], "ends before|does not end"),
        (lambda c: c[-32:], "ends before"),
        (lambda c: np.concatenate([c[:2], c]), "does not end where it began"),
        (lambda c: c ^ (np.arange(c.size) == c.size - 1).astype(np.uint8), "does not end|before"),
    ],
)
def test_damaged_streams_are_errors(decode, damage, said):
    tables, index = some_tables(), np.arange(5, dtype=np.uint8)
    symbols = drawn(tables, index, 2000)
    coded = rans_compiled.encode(symbols, index, tables, 8)
    with pytest.raises(CodecError, match=said):
        decode(np.ascontiguousarray(damage(coded)), index, tables, 8, np.empty_like(symbols))


@pytest.mark.parametrize(
    "frequencies",
    [[[4096, 0]], [[4095, 2]], [[4095, 0]], [[-1, 4095]], [[4095]], np.full((257, 2), 2048)],
)
def test_wrong_tables_are_refused(frequencies):
    with pytest.raises(CodecError):
        rans.RansTables(np.array(frequencies))


def test_what_tables_derive_is_what_they_say():
    frequencies = np.array([[1, 0, 4095], [2000, 2095, 1]])
    tables = rans.RansTables(frequencies)
    assert tables.log_row == 2
    for table, row in enumerate(frequencies):
        assert np.repeat(np.arange(3), row).tolist() == tables.symbol_of[table].tolist()
        begins = np.cumsum(row) - row
        assert tables.spans[table].tolist() == [*(begins << 16 | row), 0]
        assert tables.coding[table, :, 1].tolist() == tables.spans[table].tolist()
        expected = [-(-(1 << 44) // max(int(f), 1)) for f in (*row, 0)]
        assert tables.coding[table, :, 0].tolist() == expected


def test_division_by_reciprocal_is_exact():
    """At the ends of the range of states and around every multiple of the divisor there."""
    for freq in (1, 2, 3, 5, 7, 1023, 2047, 2049, 4093, 4095):
        tables = rans.RansTables(np.array([[freq, rans.PROB_SCALE - freq]]))
        limit = freq << 20
        tops = np.arange(limit - 3 * freq, limit, dtype=object)
        states = [x for x in (*range(65536, 65536 + 3 * freq), *tops) if x < limit]
        reciprocal = int(tables.coding[0, 0, 0])
        assert all(x * reciprocal >> 44 == x // freq for x in states)
        assert (limit - 1) * reciprocal < 1 << 64


@pytest.mark.parametrize("alphabet", [2, 3, 16, 256])
def test_normalised_tables_add_up_cost_little_and_agree(alphabet):
    for _ in range(30):
        counts = np.floor(RNG.random((1, alphabet)) * 10.0 ** RNG.integers(0, 6, alphabet))
        counts[0, RNG.integers(alphabet)] += 1
        freqs = rans.normalise(counts)
        assert (rans_compiled.normalise(counts) == freqs).all()
        assert freqs.sum() == rans.PROB_SCALE
        assert freqs.max() <= rans.MAX_FREQUENCY
        assert (freqs[counts > 0] > 0).all()
        share = counts[counts > 0] / counts.sum()
        spent = -(share * np.log2(freqs[counts > 0] / rans.PROB_SCALE)).sum()
        assert spent <= -(share * np.log2(share)).sum() + 0.05 * (alphabet > 16) + 0.006


def test_one_symbol_alone_leaves_room_for_another():
    assert rans.normalise(np.array([[0, 9, 0], [9, 0, 0]])).tolist() == [[1, 4095, 0], [4095, 1, 0]]
