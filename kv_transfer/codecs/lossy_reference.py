"""The lossy codecs in plain numpy: what the compiled and the Triton kernels must give, bit for bit.

Products of whole numbers are exact in any order (``lossy_profile`` caps their sums), so they are
left to the matrix library. What is not exact is one multiplication or addition at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_transfer.codecs.contract import CodecError
from kv_transfer.codecs.lossy_profile import ESCAPE, FRACTION, MAX_GRID, MAX_QUOTIENT, ZERO_SYMBOL
from kv_transfer.codecs.lossy_tables import F32, LayerTables, LevelTables, Segments
from kv_transfer.codecs.rans import U8

I16 = NDArray[np.int16]


def quantise(
    x: F32,
    head_dim: int,
    cos: F32,
    sin: F32,
    layer: LayerTables,
    level: LevelTables,
    runs: Segments,
) -> tuple[U8, I16, NDArray[np.int64]]:
    """Symbols, escaped quotients and the rows that must go raw, in the order of coding.

    x: ``[2, T, heads, head_dim]``. A row is a token of a group: number
    ``(kind * G + group) * T + token``.
    """
    groups = turned_groups(x, head_dim, layer, cos, -sin)
    symbols, escapes, raw_rows = [], [], []
    num_tokens = x.shape[1]
    for kind, group in np.ndindex(layer.rank.shape[:2]):
        with np.errstate(invalid="ignore", over="ignore"):
            z = np.rint((groups[kind, group] - layer.mean[kind, group]) * layer.grid[kind, group])
            is_raw = ~(np.abs(z) <= MAX_GRID).all(1)
        z[is_raw] = 0
        y = (z.astype(np.float64) @ layer.analysis[kind, group]).astype(np.float32)
        begin = 0
        for age, end in zip(runs.kind, runs.end, strict=True):
            rank = layer.rank[kind, group, age]
            multiplier = layer.multiplier[kind, group, age, :rank]
            quotient = np.rint(y[begin:end, :rank] * multiplier)
            is_raw[begin:end] |= ~(np.abs(quotient) <= MAX_QUOTIENT).all(1)
            quotient[is_raw[begin:end]] = 0
            whole = quotient.astype(np.int16)
            limit = level.limit[layer.table[kind, group, age, :rank]]
            is_escaped = np.abs(whole) > limit
            symbols.append(np.where(is_escaped, ESCAPE, whole + ZERO_SYMBOL).astype(np.uint8))
            escapes.append(whole[is_escaped])
            begin = end
        first = (kind * layer.rank.shape[1] + group) * num_tokens
        raw_rows.append(np.flatnonzero(is_raw) + first)
    flat = [s.reshape(-1) for s in symbols]
    return np.concatenate(flat), np.concatenate(escapes), np.concatenate(raw_rows)


def reconstruct(
    symbols: U8,
    escapes: I16,
    num_tokens: int,
    head_dim: int,
    cos: F32,
    sin: F32,
    layer: LayerTables,
    level: LevelTables,
    runs: Segments,
) -> F32:
    """``[2, T, heads, head_dim]``. Raises CodecError when escapes and symbols do not match."""
    is_escaped = symbols == ESCAPE
    if int(is_escaped.sum()) != escapes.size:
        raise CodecError(f"KV section with {escapes.size} escapes, {is_escaped.sum()} used")
    quotients = symbols.astype(np.int32) - ZERO_SYMBOL
    quotients[is_escaped] = escapes
    num_groups, width = layer.mean.shape[1:]
    x = np.empty((2, num_groups, num_tokens, width), np.float32)
    at = 0
    for kind, group in np.ndindex(2, num_groups):
        begin = 0
        for age, end in zip(runs.kind, runs.end, strict=True):
            rank = layer.rank[kind, group, age]
            count = (end - begin) * rank
            q = quotients[at : at + count].reshape(end - begin, rank)
            shrink = level.shrink[layer.table[kind, group, age, :rank]]
            nearer = np.where(np.abs(q) > 1, shrink[:, 1], shrink[:, 0])
            fine = FRACTION * q - np.sign(q) * nearer
            sums = fine.astype(np.float64) @ layer.synthesis[kind, group, :rank]
            scaled = sums.astype(np.float32) * layer.factor[kind, group, age]
            x[kind, group, begin:end] = scaled + layer.mean[kind, group]
            at, begin = at + count, end
    heads = np.moveaxis(x, 1, 2).reshape(2, num_tokens, -1, head_dim)
    heads[0] = turn(heads[0], cos, sin)
    return heads


def turned_groups(x: F32, head_dim: int, layer: LayerTables, cos: F32, sin: F32) -> F32:
    """``[2, G, T, C]`` of ``[2, T, heads, head_dim]``, keys turned."""
    num_groups, width = layer.mean.shape[1:]
    with np.errstate(invalid="ignore", over="ignore"):
        turned = np.stack([turn(x[0], cos, sin), x[1]])
    grouped = turned.reshape(2, x.shape[1], num_groups, width)
    return np.ascontiguousarray(np.moveaxis(grouped, 2, 1))


def turn(heads: F32, cos: F32, sin: F32) -> F32:
    """``[T, heads, head_dim]`` with the pairs (i, i + P) turned by angles ``[T, P]``."""
    pairs = cos.shape[1]
    out: NDArray[Any] = heads.copy()
    a, b = heads[..., :pairs], heads[..., pairs : 2 * pairs]
    c, s = cos[:, None], sin[:, None]
    out[..., :pairs] = a * c - b * s
    out[..., pairs : 2 * pairs] = b * c + a * s
    return out
