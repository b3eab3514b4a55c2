"""CacheGen as its paper describes it and as it is released: the baselines. For measurements alone.

Both are charged what an ideal coder would need for their symbols under their own probability
models, which is less than any real one; what they send beside symbols is counted in full.
Arrays: ``[L, 2, T, C]`` float32, keys as the cache has them (turned).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

GROUP_TOKENS = 10
ANCHOR_LEVELS = 255
BIN_SIZES = (0.5, 1.0, 1.5)
"""Of deltas, in units of their standard deviation, for the three thirds of the layers."""
TABLE_ENTRY_BITS = 16
SCALE_BITS = 16


@dataclass(frozen=True, slots=True)
class Coded:
    """kv: as decoded. bits: on the wire; bits_without_tables: the same with tables for free."""

    kv: F32
    bits: float
    bits_without_tables: float


def as_published(kv: F32, scale: float) -> Coded:
    """Groups of ten tokens, the first (the anchor) in 8 bits, the others as deltas to it with bins
    that grow with depth; a probability model per (layer, channel), anchors apart. scale: of all
    bins. The paper does not say where tables come from; both ways of counting are given."""
    num_layers, _, num_tokens, _ = kv.shape
    anchors = np.arange(0, num_tokens, GROUP_TOKENS)
    is_anchor = np.zeros(num_tokens, bool)
    is_anchor[anchors] = True
    first = kv[:, :, anchors]
    peak = np.maximum(np.abs(first).max(-1, keepdims=True), 1e-12)
    half = ANCHOR_LEVELS // 2
    anchor_symbols = np.rint(first / peak * half).astype(np.int64)
    restored = (anchor_symbols / half * peak).astype(np.float32)
    base = restored[:, :, np.arange(num_tokens) // GROUP_TOKENS]
    deltas = (kv - base)[:, :, ~is_anchor]
    spread = np.maximum(deltas.std(2, keepdims=True), 1e-12)
    third = np.array(BIN_SIZES)[np.arange(num_layers) * 3 // num_layers]
    step = spread * (scale * third)[:, None, None, None]
    delta_symbols = np.rint(deltas / step).astype(np.int64)
    out = base.copy()
    out[:, :, ~is_anchor] += (delta_symbols * step).astype(np.float32)
    tables = 0.0
    payload = 0.0
    for symbols in (anchor_symbols, delta_symbols):
        bits, used = _ideal_bits(symbols)
        payload += bits
        tables += used * TABLE_ENTRY_BITS
    scales = (peak.size + spread.size) * SCALE_BITS
    return Coded(out, payload + scales + tables, payload + scales)


def as_shipped(kv: F32, bins: tuple[tuple[int, ...], tuple[int, ...]], chunk: int) -> Coded:
    """No deltas: every token divided by its largest magnitude over all heads, rounded to few
    levels; a table of 33 entries per (layer, channel) with every chunk, a length per stream.

    bins: of each layer, for K and for V. chunk: tokens; 256 where LMCache is not configured.
    """
    num_layers, _, num_tokens, width = kv.shape
    levels = np.array(bins).T[:, :, None, None] // 2 - 1
    peak = np.maximum(np.abs(kv).max(-1, keepdims=True), 1e-12)
    symbols = np.rint(kv * levels / peak).astype(np.int64)
    out = (symbols / levels * peak).astype(np.float32)
    channels = num_layers * 2 * width
    payload = tables = 0.0
    for begin in range(0, num_tokens, chunk):
        part = symbols[:, :, begin : begin + chunk]
        payload += _ideal_bits(part)[0]
        tables += channels * (max(max(b) for b in bins) + 1) * TABLE_ENTRY_BITS
        payload += channels * 32 * -(-part.shape[2] // 256)
    payload += peak.size * SCALE_BITS
    return Coded(out, payload + tables, payload)


def shipped_bins(num_layers: int, level: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The released levels (3 finest), their layer ranges of 32 layers scaled to ``num_layers``."""
    keys = {1: (16, 16, 12), 2: (32, 16, 16), 3: (32, 32, 32)}[level]
    early, late = {1: (16, 12), 2: (32, 16), 3: (32, 32)}[level]
    place = np.arange(num_layers) * 32 // num_layers
    k = tuple(keys[0] if p < 10 else keys[1] if p < 20 else keys[2] for p in place)
    return k, tuple(early if p < 2 else late for p in place)


def _ideal_bits(symbols: I64) -> tuple[float, int]:
    """Entropy of ``[L, 2, n, C]`` by (layer, K or V, channel), in bits, and how many (channel,
    symbol) pairs occur."""
    flat = np.moveaxis(symbols, 2, -1).reshape(-1, symbols.shape[2])
    low = flat.min(1, keepdims=True)
    size = int((flat - low).max()) + 1
    rows = np.arange(len(flat))[:, None]
    counts = np.bincount((flat - low + rows * size).ravel(), minlength=len(flat) * size)
    counts = counts[counts > 0].astype(np.float64)
    return float(counts.sum() * np.log2(symbols.shape[2]) - (counts * np.log2(counts)).sum()), len(
        counts
    )
