"""rANS (``rans``: the format and the contract) compiled for one CPU core.

A few hundred million symbols a second each way. There is no branch that depends on data: whether
a lane moves a word is arithmetic on the comparison. Indices are unsigned, for with signed ones
numba adds a test for negative indices to every access.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_transfer.codecs.contract import CodecError
from kv_transfer.codecs.jit import kernel, primitive
from kv_transfer.codecs.rans import (
    STATE_START,
    U8,
    WORD_BYTES,
    RansTables,
    check_arguments,
    check_coded,
    max_coded_bytes,
)

U32, U64 = np.uint32, np.uint64
_LEAST_PERIOD = 256
_ENDED_EARLY = -1


def encode(symbols: U8, index: U8, tables: RansTables, num_lanes: int) -> U8:
    """As ``encode_reference``."""
    out = np.empty(max_coded_bytes(symbols.size, num_lanes), np.uint8)
    return out[: encode_into(symbols, index, tables, num_lanes, out)]


def encode_into(symbols: U8, index: U8, tables: RansTables, num_lanes: int, out: U8) -> int:
    """Writes the stream to the front of ``out`` and returns its length.

    out: at least ``max_coded_bytes`` long; what is behind the stream may be overwritten.
    """
    check_arguments(symbols, index, tables, num_lanes)
    assert out.size >= max_coded_bytes(symbols.size, num_lanes), out.size
    is_known = symbols.size == 0 or int(symbols.max()) < tables.alphabet
    rows = np.left_shift(_repeated(index), tables.log_row, dtype=np.uint16)
    coding = tables.coding.reshape(-1)
    num_bytes = _encode(symbols, rows, coding, num_lanes, out) if is_known else -1
    if num_bytes < 0:
        raise ValueError("a symbol has frequency 0 in its table, or is not in it")
    return int(num_bytes)


def decode(coded: U8, index: U8, tables: RansTables, num_lanes: int, out: U8) -> None:
    """As ``decode_reference``."""
    check_arguments(out, index, tables, num_lanes)
    num_words = check_coded(coded, num_lanes)
    words = coded[: num_words * WORD_BYTES]
    states = coded[num_words * WORD_BYTES :].copy().view("<u4")
    index = _repeated(index)
    symbol_of, spans = tables.symbol_of.reshape(-1), tables.spans.reshape(-1)
    left = _decode(words, states, index, symbol_of, spans, tables.log_row, out)
    if left == _ENDED_EARLY:
        raise CodecError(f"rANS stream ends before its {out.size} symbols")
    if left or (states != STATE_START).any():
        raise CodecError(f"rANS stream of {out.size} symbols does not end where it began")


def _repeated(index: U8) -> U8:
    """The same sequence with a longer period: kernels run through one at a time."""
    return index if index.size >= _LEAST_PERIOD else np.tile(index, -(-_LEAST_PERIOD // index.size))


def normalise(counts: NDArray[Any]) -> NDArray[np.int64]:
    """As ``rans.normalise``."""
    counts = np.ascontiguousarray(counts, np.float64)
    assert counts.ndim == 2, counts.shape
    assert (counts >= 0).all()
    assert (counts.sum(axis=1) > 0).all()
    out = np.zeros(counts.shape, np.int64)
    _normalise(counts, out)
    return out


@kernel
def _normalise(counts: NDArray[np.float64], out: NDArray[np.int64]) -> None:
    for table in range(counts.shape[0]):
        row, freqs = counts[table], out[table]
        num_used, total = 0, 0.0
        for symbol in range(row.size):
            total += row[symbol]
            num_used += row[symbol] > 0
        excess = -4096
        for symbol in range(row.size):
            if row[symbol] > 0:
                share = np.rint(row[symbol] / (total / 4096))
                freqs[symbol] = min(max(np.int64(share), 1), 4095)
                excess += freqs[symbol]
        if num_used == 1:
            freqs[1 if row[0] > 0 else 0] = 1
            continue
        while excess != 0:
            best, at = -1.0, 0
            for symbol in range(row.size):
                freq = freqs[symbol]
                if excess < 0 and freq > 0 and row[symbol] / (2 * freq + 1) > best:
                    best, at = row[symbol] / (2 * freq + 1), symbol
                if excess > 0 and freq > 1 and (best < 0 or row[symbol] / (2 * freq - 1) < best):
                    best, at = row[symbol] / (2 * freq - 1), symbol
            step = -1 if excess > 0 else 1
            freqs[at] += step
            excess += step


@primitive
def _encode_period(
    symbols: U8, rows: NDArray[np.uint16], lane: Any, coding: Any, states: Any, out: U8, end: Any
) -> Any:
    """(where the words end, a number with the top bit set where a symbol cannot be coded).

    lane: of the first symbol.
    """
    lane_mask, missing = U64(states.size - 1), U32(0)
    i = U64(symbols.size)
    while i > U64(0):
        i -= U64(1)
        entry = (U64(rows[i]) | U64(symbols[i])) << U64(1)
        span = U32(coding[entry + U64(1)])
        freq = span & U32(0xFFFF)
        missing |= freq - U32(1)
        x = states[(i + lane) & lane_mask]
        out[end] = x & U32(0xFF)
        out[end + U64(1)] = (x >> U32(8)) & U32(0xFF)
        is_full = x >> U32(20) >= freq
        end += U64(is_full) << U64(1)
        x = x >> (U32(is_full) << U32(4))
        quotient = U32((U64(x) * coding[entry]) >> U64(44))
        states[(i + lane) & lane_mask] = x + quotient * (U32(4096) - freq) + (span >> U32(16))
    return end, missing


@kernel
def _encode(symbols: U8, rows: Any, coding: Any, num_lanes: int, out: U8) -> Any:
    """Bytes written, or -1 where a symbol cannot be coded.

    rows: uint16, where each table's row begins in ``coding``, for one period. The inner loop has
    few enough values for a processor's registers: what a symbol does not need is kept out of it.
    """
    states = np.full(num_lanes, U32(65536), np.uint32)
    end, missing, period = U64(0), U32(0), rows.size
    for begin in range((symbols.size - 1) // period * period, -1, -period):
        stop = min(begin + period, symbols.size)
        lane = U64(begin) & U64(num_lanes - 1)
        chunk, chunk_rows = symbols[begin:stop], rows[: stop - begin]
        end, found = _encode_period(chunk, chunk_rows, lane, coding, states, out, end)
        missing |= found
    for state in states:
        for byte in range(4):
            out[end] = (state >> U32(8 * byte)) & U32(0xFF)
            end += U64(1)
    return -1 if missing >> U32(31) else np.int64(end)


@primitive
def _take(x: Any, table: Any, symbol_of: U8, spans: NDArray[np.uint32], row: Any) -> Any:
    """(symbol, state without it); a state below 2**16 then needs a word."""
    slot = x & U32(4095)
    symbol = symbol_of[U64(table) << U64(12) | U64(slot)]
    span = spans[U64(table) << row | U64(symbol)]
    return symbol, (span & U32(0xFFFF)) * (x >> U32(12)) + slot - (span >> U32(16))


@kernel
def _decode(
    words: U8,
    states: NDArray[np.uint32],
    index: U8,
    symbol_of: U8,
    spans: NDArray[np.uint32],
    log_row: int,
    out: U8,
) -> Any:
    """Words left when all symbols are out, or -1 when they did not suffice.

    A symbol takes at most one word. So as many symbols as words are left need no test for the
    end; when none are left, the remaining symbols must not ask for any.
    """
    lane_mask, row = U64(states.size - 1), U64(log_row)
    left, period, num_symbols = U64(words.size // 2), U64(index.size), U64(out.size)
    i, at = U64(0), U64(0)
    while i < num_symbols and left > U64(0):
        at = U64(0) if at == period else at
        stop = min(i + min(left, period - at), num_symbols)
        while i < stop:
            symbol, x = _take(states[i & lane_mask], index[at], symbol_of, spans, row)
            out[i] = symbol
            last = (left - U64(1)) << U64(1)
            word = U32(words[last]) | U32(words[last + U64(1)]) << U32(8)
            is_short = x < U32(65536)
            states[i & lane_mask] = (x << U32(16)) | word if is_short else x
            left -= U64(is_short)
            i += U64(1)
            at += U64(1)
    while i < num_symbols:
        at = U64(0) if at == period else at
        symbol, x = _take(states[i & lane_mask], index[at], symbol_of, spans, row)
        out[i] = symbol
        if x < U32(65536):
            return -1
        states[i & lane_mask] = x
        i += U64(1)
        at += U64(1)
    return np.int64(left)
