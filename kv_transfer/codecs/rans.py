"""Interleaved rANS with static tables: the format, its tables and the plain reference.

Symbol ``i`` of a stream belongs to lane ``i % num_lanes`` and is coded with table
``index[i % len(index)]``. Each lane has a 32-bit state ``x`` in [2**16, 2**32), starting at 2**16.
To code a symbol of frequency ``f`` (of 4,096) that begins at ``c``:

    if x >= f << 20: emit the low 16 bits of x; x >>= 16
    x = (x // f << 12) + x % f + c

Symbols are coded from the last to the first and decoded from the first to the last. The stream is
the words as emitted (little-endian), then the lanes' states (4 bytes each); a decoder takes the
words from the back. So lanes share one run of words and no lengths are sent: within a step, the
lanes that need a word take them in order of lanes, which a GPU finds by counting among lanes. One
run per lane would cost 2 or 3 bytes each and save only that count (ADR 16).

A decoder ends with every word taken and every state at 2**16 again, or the stream is damaged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_transfer.codecs.contract import CodecError
from kv_transfer.codecs.rans_fill import fill

PROB_BITS = 12
PROB_SCALE = 1 << PROB_BITS
MAX_FREQUENCY = PROB_SCALE - 1
"""``f << 20`` must fit 32 bits: where one symbol is all there is, another takes 1."""
MAX_TABLES = 256
MAX_ALPHABET = 256
STATE_START = 1 << 16
STATE_BYTES = 4
WORD_BYTES = 2
MAX_LANES = 1024
_SYMBOLS_PER_LANE = 4096

U8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class RansTables:
    """Static tables, derived once from ``frequencies`` and only read from then on.

    frequencies: int64 ``[num_tables, alphabet]``; each row sums to 4,096; a symbol of frequency
    0 cannot be coded. symbol_of: uint8 ``[num_tables, 4096]``, slot to symbol. spans: uint32
    ``[num_tables, row]``, first slot in the high half, frequency in the low; ``row`` is the
    alphabet up to a power of two, so that kernels shift to a row instead of multiplying. coding:
    uint64 ``[num_tables, row, 2]``: ``r = ceil(2**44 / f)``, so that ``x // f == x * r >> 44``
    for every x < f << 20, and the span again, beside it.
    """

    frequencies: NDArray[np.int64]
    symbol_of: U8 = field(init=False, repr=False)
    spans: NDArray[np.uint32] = field(init=False, repr=False)
    coding: NDArray[np.uint64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        freqs = np.ascontiguousarray(self.frequencies, np.int64)
        num_tables, alphabet = freqs.shape
        if not 0 < num_tables <= MAX_TABLES or not 1 < alphabet <= MAX_ALPHABET:
            raise CodecError(f"{num_tables} tables of {alphabet} symbols: at most 256 of 2 to 256")
        if freqs.min() < 0 or freqs.max() > MAX_FREQUENCY:
            raise CodecError(f"a frequency is {freqs.min()} or {freqs.max()}, allowed are 0..4095")
        if (freqs.sum(axis=1) != PROB_SCALE).any():
            raise CodecError(f"frequencies of a table add up to {freqs.sum(axis=1)}, not 4096")
        row = 1 << (alphabet - 1).bit_length()
        derived: dict[str, NDArray[Any]] = {
            "frequencies": freqs,
            "symbol_of": np.empty((num_tables, PROB_SCALE), np.uint8),
            "spans": np.zeros((num_tables, row), np.uint32),
            "coding": np.empty((num_tables, row, 2), np.uint64),
        }
        fill(freqs, derived["symbol_of"], derived["spans"], derived["coding"])
        for name, array in derived.items():
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @property
    def num_tables(self) -> int:
        return int(self.frequencies.shape[0])

    @property
    def alphabet(self) -> int:
        return int(self.frequencies.shape[1])

    @property
    def log_row(self) -> int:
        """Binary logarithm of the entries of a row of ``spans``."""
        return int(self.spans.shape[1]).bit_length() - 1

    def bits(self) -> NDArray[np.float64]:
        """``[num_tables, alphabet]``: what each symbol costs; infinite where it cannot be coded."""
        with np.errstate(divide="ignore"):
            return PROB_BITS - np.log2(self.frequencies)


def normalise(counts: NDArray[Any]) -> NDArray[np.int64]:
    """Frequencies for ``RansTables`` from non-negative counts ``[num_tables, alphabet]``.

    Each symbol that was counted gets at least 1, so that it can be coded; the others get 0.
    Rounded shares rarely add up to 4,096; each step towards it is taken where it costs the fewest
    bits, to first order (``f`` to ``f + 1`` gains about ``count / (f + 1 / 2)``). Only sums and
    divisions of float64, which round alike everywhere, and the first of equals: so encoders that
    count alike have the same tables.
    """
    counts = np.asarray(counts, np.float64)
    assert counts.ndim == 2, counts.shape
    assert (counts >= 0).all()
    assert (counts.sum(axis=1) > 0).all()
    return np.stack([_normalise_row(row) for row in counts])


def _normalise_row(counts: NDArray[np.float64]) -> NDArray[np.int64]:
    used = counts > 0
    if np.count_nonzero(used) == 1:
        return np.where(used, MAX_FREQUENCY, np.arange(len(counts)) == int(used[0]))
    shares = np.rint(counts / (counts.sum() / PROB_SCALE))
    freqs = np.where(used, np.clip(shares, 1, MAX_FREQUENCY), 0).astype(np.int64)
    while (excess := int(freqs.sum()) - PROB_SCALE) != 0:
        if excess > 0:
            loss = np.where(freqs > 1, counts / (2 * freqs - 1), np.inf)
            freqs[np.argmin(loss)] -= 1
        else:
            gain = np.where(used, counts / (2 * freqs + 1), -1.0)
            freqs[np.argmax(gain)] += 1
    return freqs


def lanes_for(num_symbols: int) -> int:
    """A power of two, 1 to 1,024: as many lanes as cost at most 0.006 bits a symbol.

    A lane costs about 24 bits: of the 32 of its state 8 carry symbols, on average.
    """
    lanes = 1
    while lanes < MAX_LANES and lanes * 2 * _SYMBOLS_PER_LANE <= num_symbols:
        lanes *= 2
    return lanes


def max_coded_bytes(num_symbols: int, num_lanes: int) -> int:
    return num_symbols * WORD_BYTES + num_lanes * STATE_BYTES


def encode_reference(symbols: U8, index: U8, tables: RansTables, num_lanes: int) -> U8:
    """The stream as bytes. Raises ValueError for a symbol whose frequency is 0.

    symbols: ``[n]``, each below the alphabet. index: ``[period]``, each below ``num_tables``.
    """
    check_arguments(symbols, index, tables, num_lanes)
    n = symbols.size
    rows = index[np.arange(n) % len(index)] if n else index[:0]
    spans = tables.spans[rows, symbols].astype(np.uint64)
    freqs, begins = spans & 0xFFFF, spans >> np.uint64(16)
    if (freqs == 0).any():
        raise ValueError(f"symbol {symbols[np.argmin(freqs)]} has frequency 0 in its table")
    states = np.full(num_lanes, STATE_START, np.uint64)
    words: list[NDArray[np.uint16]] = []
    for begin in range((n - 1) // num_lanes * num_lanes, -1, -num_lanes):
        f, c = freqs[begin : begin + num_lanes], begins[begin : begin + num_lanes]
        x = states[: len(f)]
        is_full = x >= f << np.uint64(20)
        words.append((x[is_full][::-1] & np.uint64(0xFFFF)).astype("<u2"))
        x = np.where(is_full, x >> np.uint64(16), x)
        states[: len(f)] = (x // f << np.uint64(PROB_BITS)) + x % f + c
    parts = [*words, states.astype("<u4")]
    return np.concatenate([part.view(np.uint8) for part in parts])


def decode_reference(coded: U8, index: U8, tables: RansTables, num_lanes: int, out: U8) -> None:
    """Fills ``out`` (``[n]``) with the symbols. Raises CodecError for damaged bytes."""
    check_arguments(out, index, tables, num_lanes)
    num_words = check_coded(coded, num_lanes)
    n = out.size
    words = coded[: num_words * WORD_BYTES].copy().view("<u2").astype(np.uint64)
    states = coded[num_words * WORD_BYTES :].copy().view("<u4").astype(np.uint64)
    rows = index[np.arange(n) % len(index)] if n else index[:0]
    for begin in range(0, n, num_lanes):
        row = rows[begin : begin + num_lanes]
        x = states[: len(row)]
        slot = x & np.uint64(PROB_SCALE - 1)
        symbol = tables.symbol_of[row, slot]
        span = tables.spans[row, symbol].astype(np.uint64)
        x = (
            (span & np.uint64(0xFFFF)) * (x >> np.uint64(PROB_BITS))
            + slot
            - (span >> np.uint64(16))
        )
        needs = np.flatnonzero(x < STATE_START)
        if len(needs) > num_words:
            raise CodecError(f"rANS stream ends before symbol {begin + num_lanes} of {n}")
        taken = words[num_words - len(needs) : num_words][::-1]
        x[needs] = x[needs] << np.uint64(16) | taken
        num_words -= len(needs)
        states[: len(row)] = x
        out[begin : begin + num_lanes] = symbol
    if num_words or (states != STATE_START).any():
        raise CodecError(f"rANS stream of {n} symbols does not end where it began")


def check_arguments(symbols: U8, index: U8, tables: RansTables, num_lanes: int) -> None:
    """Our own side's promises, held by all implementations. ``symbols`` may be what is written."""
    assert symbols.dtype == np.uint8, symbols.dtype
    assert index.dtype == np.uint8, index.dtype
    assert symbols.flags.c_contiguous
    assert index.flags.c_contiguous
    assert 0 < num_lanes <= MAX_LANES, num_lanes
    assert num_lanes & (num_lanes - 1) == 0, num_lanes
    assert len(index) > 0
    assert int(index.max()) < tables.num_tables, (index.max(), tables.num_tables)


def check_coded(coded: U8, num_lanes: int) -> int:
    """Number of words of a stream. Raises CodecError for a length that no stream has."""
    num_bytes = len(coded) - num_lanes * STATE_BYTES
    if num_bytes < 0 or num_bytes % WORD_BYTES:
        raise CodecError(f"rANS stream of {len(coded)} bytes with {num_lanes} lanes")
    return num_bytes // WORD_BYTES
