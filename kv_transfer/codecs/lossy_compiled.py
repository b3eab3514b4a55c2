"""``lossy_reference`` compiled for one CPU core: same arguments, same bits."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from kv_transfer.codecs.contract import Array, CodecError
from kv_transfer.codecs.float_values import LARGEST
from kv_transfer.codecs.jit import kernel, primitive
from kv_transfer.codecs.lossy_profile import ESCAPE, FRACTION, MAX_GRID, MAX_QUOTIENT, ZERO_SYMBOL
from kv_transfer.codecs.lossy_tables import F32, I32, LayerTables, LevelTables, Segments
from kv_transfer.codecs.rans import U8

I16 = NDArray[np.int16]
U32 = np.uint32
BLOCK = 4
_GRID = np.float32(MAX_GRID)
_LARGEST = np.float32(LARGEST["bfloat16"])
_QUOTIENT = np.float32(MAX_QUOTIENT)


def quantise(
    x: Array,
    head_dim: int,
    cos: F32,
    sin: F32,
    layer: LayerTables,
    level: LevelTables,
    runs: Segments,
    num_symbols: int,
) -> tuple[U8, I16, NDArray[np.int64]]:
    """As in ``lossy_reference``. x: bits of bfloat16 (uint16) or of float32 (uint32)."""
    symbols = np.empty(num_symbols, np.uint8)
    escapes = np.empty(num_symbols, np.int16)
    raw_rows = np.empty(2 * layer.mean.shape[1] * x.shape[1], np.int64)
    num_escapes, num_raw = _quantise(
        x.reshape(2, x.shape[1], -1),
        U32(16 if x.dtype == np.uint16 else 0),
        head_dim,
        cos,
        sin,
        layer.mean,
        layer.grid,
        layer.analysis,
        layer.multiplier,
        layer.rank,
        level.limit.astype(np.float32)[layer.table],
        runs.kind,
        runs.end,
        symbols,
        escapes,
        raw_rows,
    )
    return symbols, escapes[:num_escapes], raw_rows[:num_raw]


def reconstruct(
    symbols: U8,
    escapes: I16,
    head_dim: int,
    cos: F32,
    sin: F32,
    layer: LayerTables,
    level: LevelTables,
    runs: Segments,
    out: Array,
) -> None:
    """As in ``lossy_reference``, into ``out`` ``[2, T, heads, head_dim]``: uint16 gets bfloat16,
    uint32 the bits of float32."""
    used = _reconstruct(
        symbols,
        escapes,
        head_dim,
        cos,
        sin,
        layer.mean,
        layer.factor,
        layer.synthesis,
        layer.rank,
        level.shrink[layer.table],
        runs.kind,
        runs.end,
        out.reshape(2, out.shape[1], -1),
    )
    if used != escapes.size:
        raise CodecError(f"KV section with {escapes.size} escapes does not use just these")


def _fused(function: Any) -> Any:
    """Multiply and add may be fused here: every sum is a whole number that float32 holds."""
    return numba.njit(nogil=True, fastmath={"contract"})(function)


@_fused
def _project(z: Any, analysis: Any, num_outputs: Any, y: Any) -> Any:
    """``y[r] = z[r] @ analysis`` for the rows of ``z``, all ``BLOCK`` at once: so the matrix is
    read, and sums are written, less often."""
    for row in range(BLOCK):
        for j in range(num_outputs):
            y[row, j] = np.float32(0.0)
    even = z.shape[1] - z.shape[1] % 2
    for k in range(0, even, 2):
        a0, a1, b0, b1 = z[0, k], z[0, k + 1], z[1, k], z[1, k + 1]
        c0, c1, d0, d1 = z[2, k], z[2, k + 1], z[3, k], z[3, k + 1]
        for j in range(num_outputs):
            m0, m1 = analysis[k, j], analysis[k + 1, j]
            y[0, j] += a0 * m0 + a1 * m1
            y[1, j] += b0 * m0 + b1 * m1
            y[2, j] += c0 * m0 + c1 * m1
            y[3, j] += d0 * m0 + d1 * m1
    for k in range(even, z.shape[1]):
        for row in range(BLOCK):
            for j in range(num_outputs):
                y[row, j] += z[row, k] * analysis[k, j]


@primitive
def _load_row(
    x: Any,
    shift: Any,
    head_dim: Any,
    is_key: Any,
    cos: Any,
    sin: Any,
    bits: Any,
    row: Any,
    out: Any,
) -> Any:
    """Channels of one token's group as float32, keys turned back to position 0. ``row`` is the
    memory of ``bits``. Slices, since numba vectorises no loop over shifted indices."""
    for j in range(x.size):
        bits[j] = U32(x[j]) << shift
    if not is_key:
        out[:] = row
        return
    pairs = cos.size
    for head in range(0, x.size, head_dim):
        a, b = row[head : head + pairs], row[head + pairs : head + 2 * pairs]
        first, second = out[head : head + pairs], out[head + pairs : head + 2 * pairs]
        for p in range(pairs):
            u = a[p] * cos[p] + b[p] * sin[p]
            v = b[p] * cos[p] - a[p] * sin[p]
            first[p], second[p] = u, v
        for j in range(head + 2 * pairs, head + head_dim):
            out[j] = row[j]


@primitive
def _to_grid(x: Any, mean: Any, grid: Any, z: Any) -> Any:
    """Whether all of the row lies on the grid; rows that do not become zero."""
    outside = np.int32(0)
    for j in range(x.size):
        whole = np.rint((x[j] - mean[j]) * grid[j])
        z[j] = whole
        outside |= np.int32(0) if np.abs(whole) <= _GRID else np.int32(1)
    if outside:
        z[:] = np.float32(0.0)
    return outside == 0


@primitive
def _round(values: Any, factors: Any, limits: Any, quotients: Any, symbols: Any) -> Any:
    """Quotients and symbols of one row. (whether a quotient is too large, or is escaped)"""
    too_far, escaped = np.int32(0), np.int32(0)
    for c in range(symbols.size):
        q = np.rint(values[c] * factors[c])
        size = np.abs(q)
        too_far |= np.int32(0) if size <= _QUOTIENT else np.int32(1)
        is_near = size <= limits[c]
        escaped |= np.int32(0) if is_near else np.int32(1)
        whole = np.int32(q)
        quotients[c] = whole
        symbols[c] = np.uint8(whole + np.int32(ZERO_SYMBOL)) if is_near else np.uint8(ESCAPE)
    return too_far != 0, escaped != 0


@kernel
def _quantise(
    x: Array,
    shift: Any,
    head_dim: int,
    cos: F32,
    sin: F32,
    mean: F32,
    grid: F32,
    analysis: F32,
    multiplier: F32,
    rank: I32,
    limit: F32,
    run_kind: I32,
    run_end: I32,
    symbols: U8,
    escapes: I16,
    raw_rows: NDArray[np.int64],
) -> Any:
    """(escapes, raw rows)."""
    num_tokens, num_groups, width = x.shape[1], mean.shape[1], mean.shape[2]
    bits = np.empty(width, np.uint32)
    row = bits.view(np.float32)
    turned = np.empty(width, np.float32)
    z = np.zeros((BLOCK, width), np.float32)
    y = np.empty((BLOCK, analysis.shape[3]), np.float32)
    quotients = np.empty(analysis.shape[3], np.int32)
    fits = np.empty(BLOCK, np.bool_)
    at, num_escapes, num_raw = 0, 0, 0
    for kind in range(2):
        for group in range(num_groups):
            channels = slice(group * width, (group + 1) * width)
            means, grids = mean[kind, group], grid[kind, group]
            begin = 0
            for run in range(run_kind.size):
                age = run_kind[run]
                r = rank[kind, group, age]
                padded = (r + 7) // 8 * 8
                factors, limits = multiplier[kind, group, age], limit[kind, group, age]
                for first in range(begin, run_end[run], BLOCK):
                    last = min(first + BLOCK, run_end[run])
                    for token in range(first, last):
                        _load_row(
                            x[kind, token, channels],
                            shift,
                            head_dim,
                            kind == 0,
                            cos[token],
                            sin[token],
                            bits,
                            row,
                            turned,
                        )
                        place = token - first
                        fits[place] = _to_grid(turned, means, grids, z[place])
                    _project(z, analysis[kind, group], padded, y)
                    for token in range(first, last):
                        place = token - first
                        mine = symbols[at : at + r]
                        too_far, escaped = _round(y[place], factors, limits, quotients, mine)
                        at += r
                        if too_far or not fits[place]:
                            raw_rows[num_raw] = (kind * num_groups + group) * num_tokens + token
                            num_raw += 1
                            mine[:] = ZERO_SYMBOL
                        elif escaped:
                            for c in range(r):
                                if mine[c] == ESCAPE:
                                    escapes[num_escapes] = quotients[c]
                                    num_escapes += 1
                begin = run_end[run]
    return num_escapes, num_raw


@primitive
def _store_row(
    x: Any, head_dim: Any, is_key: Any, cos: Any, sin: Any, bits: Any, row: Any, out: Any
) -> Any:
    """The reverse of ``_load_row``; rounds to the nearest bfloat16, as ``float_values``."""
    if is_key:
        pairs = cos.size
        for head in range(0, x.size, head_dim):
            a, b = x[head : head + pairs], x[head + pairs : head + 2 * pairs]
            first, second = row[head : head + pairs], row[head + pairs : head + 2 * pairs]
            for p in range(pairs):
                u = a[p] * cos[p] - b[p] * sin[p]
                v = b[p] * cos[p] + a[p] * sin[p]
                first[p], second[p] = u, v
            for j in range(head + 2 * pairs, head + head_dim):
                row[j] = x[j]
    else:
        row[:] = x
    if out.itemsize == 2:
        for j in range(x.size):
            row[j] = min(max(row[j], -_LARGEST), _LARGEST)
        for j in range(x.size):
            b = bits[j]
            out[j] = (b + U32(0x7FFF) + ((b >> U32(16)) & U32(1))) >> U32(16)
    else:
        for j in range(x.size):
            out[j] = bits[j]


@primitive
def _add(sums: Any, components: Any, amount: Any) -> Any:
    for j in range(sums.size):
        sums[j] += np.int32(amount * components[j])


@kernel
def _reconstruct(
    symbols: U8,
    escapes: I16,
    head_dim: int,
    cos: F32,
    sin: F32,
    mean: F32,
    factor: F32,
    synthesis: I32,
    rank: I32,
    shrink: I32,
    run_kind: I32,
    run_end: I32,
    out: Array,
) -> Any:
    """Escapes used, or -1 where they did not suffice."""
    num_groups, width = mean.shape[1], mean.shape[2]
    sums = np.empty(width, np.int32)
    values = np.empty(width, np.float32)
    bits = np.empty(width, np.uint32)
    row = bits.view(np.float32)
    at, used = 0, 0
    for kind in range(2):
        for group in range(num_groups):
            channels = slice(group * width, (group + 1) * width)
            begin = 0
            for run in range(run_kind.size):
                age = run_kind[run]
                r = rank[kind, group, age]
                factors, means = factor[kind, group, age], mean[kind, group]
                nearer, components = shrink[kind, group, age], synthesis[kind, group]
                for token in range(begin, run_end[run]):
                    sums[:] = np.int32(0)
                    for c in range(r):
                        symbol = symbols[at + c]
                        if symbol == ZERO_SYMBOL:
                            continue
                        q = np.int32(symbol) - np.int32(ZERO_SYMBOL)
                        if symbol == ESCAPE:
                            if used == escapes.size:
                                return -1
                            q = np.int32(escapes[used])
                            used += 1
                        closer = nearer[c, 1 if abs(q) > 1 else 0]
                        fine = np.int32(FRACTION * q - (closer if q > 0 else -closer))
                        if q:
                            _add(sums, components[c], fine)
                    at += r
                    for j in range(width):
                        values[j] = np.float32(sums[j]) * factors[j] + means[j]
                    _store_row(
                        values,
                        head_dim,
                        kind == 0,
                        cos[token],
                        sin[token],
                        bits,
                        row,
                        out[kind, token, channels],
                    )
                begin = run_end[run]
    return used
