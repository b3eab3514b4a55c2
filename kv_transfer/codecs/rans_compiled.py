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
    num_bytes: int = _encode(symbols, index, tables.reciprocals, tables.spans, num_lanes, out)
    if num_bytes < 0:
        raise ValueError("a symbol has frequency 0 in its table")
    return num_bytes


def decode(coded: U8, index: U8, tables: RansTables, num_lanes: int, out: U8) -> None:
    """As ``decode_reference``."""
    check_arguments(out, index, tables, num_lanes)
    num_words = check_coded(coded, num_lanes)
    words = coded[: num_words * WORD_BYTES]
    states = coded[num_words * WORD_BYTES :].copy().view("<u4")
    left = _decode(words, states, index, tables.symbol_of, tables.spans, out)
    if left == _ENDED_EARLY:
        raise CodecError(f"rANS stream ends before its {out.size} symbols")
    if left or (states != STATE_START).any():
        raise CodecError(f"rANS stream of {out.size} symbols does not end where it began")


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
def put_symbol(x: Any, span: Any, reciprocal: Any) -> Any:
    """The state with the symbol; ``x < freq << 20`` must hold. For kernels."""
    quotient = U32((U64(x) * reciprocal) >> U64(44))
    return x + quotient * (U32(4096) - (span & U32(0xFFFF))) + (span >> U32(16))


@kernel
def _encode(
    symbols: U8,
    index: U8,
    reciprocals: NDArray[np.uint64],
    spans: NDArray[np.uint32],
    num_lanes: int,
    out: U8,
) -> Any:
    """Bytes written, or -1 where a symbol cannot be coded."""
    states = np.full(num_lanes, U32(65536), np.uint32)
    lane_mask, alphabet = U64(num_lanes - 1), spans.shape[1]
    end, period = U64(0), U64(index.size)
    i = U64(symbols.size)
    at = i % period
    is_codable = True
    while i > U64(0):
        i -= U64(1)
        at = (period if at == U64(0) else at) - U64(1)
        symbol, table = symbols[i], index[at]
        if symbol >= alphabet:
            return -1
        span = spans[table, symbol]
        freq = span & U32(0xFFFF)
        is_codable &= freq != U32(0)
        x = states[i & lane_mask]
        out[end] = x & U32(0xFF)
        out[end + U64(1)] = (x >> U32(8)) & U32(0xFF)
        is_full = x >= freq << U32(20)
        end += U64(is_full) << U64(1)
        x = x >> (U32(is_full) << U32(4))
        states[i & lane_mask] = put_symbol(x, span, reciprocals[table, symbol])
    for lane in range(num_lanes):
        for byte in range(4):
            out[end] = (states[lane] >> U32(8 * byte)) & U32(0xFF)
            end += U64(1)
    return np.int64(end) if is_codable else -1


@primitive
def take_symbol(x: Any, table: Any, symbol_of: U8, spans: NDArray[np.uint32]) -> Any:
    """(symbol, state without it); a state below 2**16 then needs a word. For kernels."""
    slot = x & U32(4095)
    symbol = symbol_of[table, slot]
    span = spans[table, symbol]
    return symbol, (span & U32(0xFFFF)) * (x >> U32(12)) + slot - (span >> U32(16))


@primitive
def word_before(words: U8, left: Any) -> Any:
    """The last of ``left`` words; ``left`` must not be 0. For kernels."""
    last = (left - U64(1)) << U64(1)
    return U32(words[last]) | U32(words[last + U64(1)]) << U32(8)


@kernel
def _decode(
    words: U8,
    states: NDArray[np.uint32],
    index: U8,
    symbol_of: U8,
    spans: NDArray[np.uint32],
    out: U8,
) -> Any:
    """Words left when all symbols are out, or -1 when they did not suffice.

    A symbol takes at most one word. So as many symbols as words are left need no test for the
    end; when none are left, the remaining symbols must not ask for any.
    """
    lane_mask = U64(states.size - 1)
    left, period = U64(words.size // 2), U64(index.size)
    i, at, num_symbols = U64(0), U64(0), U64(out.size)
    while i < num_symbols and left > U64(0):
        stop = min(num_symbols, i + left)
        while i < stop:
            symbol, x = take_symbol(states[i & lane_mask], index[at], symbol_of, spans)
            out[i] = symbol
            word = word_before(words, left)
            is_short = x < U32(65536)
            states[i & lane_mask] = (x << U32(16)) | word if is_short else x
            left -= U64(is_short)
            i += U64(1)
            at += U64(1)
            at = U64(0) if at == period else at
    while i < num_symbols:
        symbol, x = take_symbol(states[i & lane_mask], index[at], symbol_of, spans)
        out[i] = symbol
        if x < U32(65536):
            return -1
        states[i & lane_mask] = x
        i += U64(1)
        at += U64(1)
        at = U64(0) if at == period else at
    return np.int64(left)
