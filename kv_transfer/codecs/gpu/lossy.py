"""``kv1`` to ``kv4`` on a GPU: a layer's rows in blocks, products on whole numbers.

``lossy_reference`` says what is computed. Products of whole numbers that float32 holds are exact
in any order of adding, so they are the hardware's; only what is not exact is kept from fusing.
One factor has at most 11 bits and the other 15, so products in three tf32 parts lose nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kv_transfer.codecs.gpu.floats import KINDS, narrowed, widened
from kv_transfer.codecs.gpu.jit import jit, power_of_two, tl
from kv_transfer.codecs.lossy_profile import ESCAPE, FRACTION, MAX_GRID, MAX_QUOTIENT, ZERO_SYMBOL

ROWS = 16
LEAST_DOT = 16
"""Sides that ``tl.dot`` takes."""


@dataclass(frozen=True, slots=True)
class DeviceLayer:
    """``LayerTables`` of one layer as tensors. limit, shrink: of each component, ``[2, G, A, W]``
    and ``[2, G, A, W, 2]``."""

    mean: Tensor
    grid: Tensor
    analysis: Tensor
    multiplier: Tensor
    synthesis: Tensor
    factor: Tensor
    rank: Tensor
    limit: Tensor
    shrink: Tensor


@dataclass(frozen=True, slots=True)
class Places:
    """Where rows' symbols stand. age: int32 ``[T]``. first: int64 ``[2 * G, T]``.
    cos, sin: ``[T, P]``."""

    age: Tensor
    first: Tensor
    cos: Tensor
    sin: Tensor


def quantise(
    bits: Tensor, dtype: str, head_dim: int, layer: DeviceLayer, places: Places, num_symbols: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(symbols uint8 ``[n]``, quotients int16 ``[n]``, whether rows go raw int8 ``[2 * G, T]``).

    bits: ``[2, T, G * C]`` of one layer, contiguous.
    """
    _, num_tokens, channels = bits.shape
    groups, width, outputs = layer.analysis.shape[1:]
    symbols = torch.empty(num_symbols, dtype=torch.uint8, device=bits.device)
    quotients = torch.empty(num_symbols, dtype=torch.int16, device=bits.device)
    is_raw = torch.empty((2 * groups, num_tokens), dtype=torch.int8, device=bits.device)
    _quantise_kernel[(2 * groups, -(-num_tokens // ROWS))](
        bits, places.cos, places.sin, layer.mean, layer.grid, layer.analysis, layer.multiplier,
        layer.rank, layer.limit, places.age, places.first, symbols, quotients, is_raw,
        num_tokens, channels, groups,
        AGES=layer.rank.shape[2], HEAD_DIM=head_dim, PAIRS=places.cos.shape[1],
        WIDTH=width, OUTPUTS=outputs, KIND=KINDS[dtype], ROWS=ROWS,
        CHANNELS=max(LEAST_DOT, power_of_two(width)),
        COMPONENTS=max(LEAST_DOT, power_of_two(outputs)),
        MAX_GRID=MAX_GRID, MAX_QUOTIENT=MAX_QUOTIENT, ZERO=ZERO_SYMBOL, ESCAPE=ESCAPE,
        enable_fp_fusion=False, num_warps=8,
    )  # fmt: skip
    return symbols, quotients, is_raw


def reconstruct(
    quotients: Tensor, dtype: str, head_dim: int, layer: DeviceLayer, places: Places, bits: Tensor
) -> None:
    """Fills ``bits`` ``[2, T, G * C]``. quotients: int16 ``[n]``, escapes in their places."""
    _, num_tokens, channels = bits.shape
    groups, width, outputs = layer.analysis.shape[1:]
    x = torch.empty(bits.shape, dtype=torch.float32, device=bits.device)
    _combine_kernel[(2 * groups, -(-num_tokens // ROWS))](
        quotients, layer.synthesis, layer.factor, layer.mean, layer.rank, layer.shrink,
        places.age, places.first, x, num_tokens, channels, groups,
        AGES=layer.rank.shape[2], WIDTH=width, OUTPUTS=outputs, ROWS=ROWS,
        CHANNELS=max(LEAST_DOT, power_of_two(width)),
        COMPONENTS=max(LEAST_DOT, power_of_two(outputs)),
        FRACTION=FRACTION, enable_fp_fusion=False, num_warps=8,
    )  # fmt: skip
    _turn_kernel[(2 * num_tokens, -(-channels // 1024))](
        x, places.cos, places.sin, bits, num_tokens, channels,
        HEAD_DIM=head_dim, PAIRS=places.cos.shape[1], KIND=KINDS[dtype], BLOCK=1024,
        enable_fp_fusion=False,
    )  # fmt: skip


@jit()
def _rint(x: tl.tensor) -> tl.tensor:
    """Half to even below 2**22; what is larger stays too large for a grid or a quotient."""
    return (x + 12582912.0) - 12582912.0


@jit("num_tokens", "channels", "groups")
def _quantise_kernel(
    bits_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    grid_ptr: tl.tensor,
    analysis_ptr: tl.tensor,
    multiplier_ptr: tl.tensor,
    rank_ptr: tl.tensor,
    limit_ptr: tl.tensor,
    age_ptr: tl.tensor,
    first_ptr: tl.tensor,
    symbols_ptr: tl.tensor,
    quotients_ptr: tl.tensor,
    is_raw_ptr: tl.tensor,
    num_tokens: tl.tensor,
    channels: tl.tensor,
    groups: tl.tensor,
    AGES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COMPONENTS: tl.constexpr,
    MAX_GRID: tl.constexpr,
    MAX_QUOTIENT: tl.constexpr,
    ZERO: tl.constexpr,
    ESCAPE: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    exists = token < num_tokens
    kind, group = place // groups, place % groups
    j = tl.arange(0, CHANNELS)
    has_channel = exists[:, None] & (j < WIDTH)[None, :]
    row = bits_ptr + (kind * num_tokens + token[:, None]) * channels + group * WIDTH
    x = widened(tl.load(row + j[None, :], mask=has_channel, other=0), KIND)
    in_head = j % HEAD_DIM
    is_first, is_turned = in_head < PAIRS, in_head < 2 * PAIRS
    partner = tl.where(is_first, j + PAIRS, tl.where(is_turned, j - PAIRS, j))
    other = widened(tl.load(row + partner[None, :], mask=has_channel, other=0), KIND)
    pair = tl.where(is_first, in_head, tl.where(is_turned, in_head - PAIRS, 0))
    angle = token[:, None] * PAIRS + pair[None, :]
    cos = tl.load(cos_ptr + angle, mask=has_channel, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=has_channel, other=0.0)
    turned = tl.where(is_first[None, :], x * cos + other * sin, x * cos - other * sin)
    x = tl.where((kind == 0) & is_turned[None, :], turned, x)
    mean = tl.load(mean_ptr + place * WIDTH + j, mask=j < WIDTH, other=0.0)
    grid = tl.load(grid_ptr + place * WIDTH + j, mask=j < WIDTH, other=1.0)
    z = _rint((x - mean[None, :]) * grid[None, :])
    is_outside = ~(tl.abs(z) <= MAX_GRID) & has_channel
    is_raw = tl.sum(is_outside.to(tl.int32), 1) > 0
    z = tl.where(is_raw[:, None] | ~has_channel, 0.0, z)
    c = tl.arange(0, COMPONENTS)
    at = (place * WIDTH + j[:, None]) * OUTPUTS + c[None, :]
    inside = (j < WIDTH)[:, None] & (c < OUTPUTS)[None, :]
    analysis = tl.load(analysis_ptr + at, mask=inside, other=0.0)
    y = tl.dot(z, analysis, input_precision="tf32x3")
    age = place * AGES + tl.load(age_ptr + token, mask=exists, other=0)
    rank = tl.load(rank_ptr + age, mask=exists, other=0)
    is_sent = c[None, :] < rank[:, None]
    row_of = age[:, None] * OUTPUTS + c[None, :]
    q = _rint(y * tl.load(multiplier_ptr + row_of, mask=is_sent, other=0.0))
    is_far = ~(tl.abs(q) <= MAX_QUOTIENT) & is_sent
    is_raw = is_raw | (tl.sum(is_far.to(tl.int32), 1) > 0)
    whole = tl.where(is_raw[:, None] | ~is_sent, 0.0, q).to(tl.int32)
    limit = tl.load(limit_ptr + row_of, mask=is_sent, other=0)
    symbol = tl.where(tl.abs(whole) <= limit, whole + ZERO, ESCAPE)
    first = tl.load(first_ptr + place * num_tokens + token, mask=exists, other=0)
    out = first[:, None] + c[None, :]
    tl.store(symbols_ptr + out, symbol.to(tl.uint8), mask=is_sent)
    tl.store(quotients_ptr + out, whole.to(tl.int16), mask=is_sent)
    tl.store(is_raw_ptr + place * num_tokens + token, is_raw.to(tl.int8), mask=exists)


@jit("num_tokens", "channels", "groups")
def _combine_kernel(
    quotients_ptr: tl.tensor,
    synthesis_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rank_ptr: tl.tensor,
    shrink_ptr: tl.tensor,
    age_ptr: tl.tensor,
    first_ptr: tl.tensor,
    x_ptr: tl.tensor,
    num_tokens: tl.tensor,
    channels: tl.tensor,
    groups: tl.tensor,
    AGES: tl.constexpr,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COMPONENTS: tl.constexpr,
    FRACTION: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    exists = token < num_tokens
    kind, group = place // groups, place % groups
    c, j = tl.arange(0, COMPONENTS), tl.arange(0, CHANNELS)
    age = place * AGES + tl.load(age_ptr + token, mask=exists, other=0)
    rank = tl.load(rank_ptr + age, mask=exists, other=0)
    is_sent = c[None, :] < rank[:, None]
    first = tl.load(first_ptr + place * num_tokens + token, mask=exists, other=0)
    q = tl.load(quotients_ptr + first[:, None] + c[None, :], mask=is_sent, other=0).to(tl.int32)
    is_large = (tl.abs(q) > 1).to(tl.int32)
    nearer = (age[:, None] * OUTPUTS + c[None, :]) * 2 + is_large
    shrink = tl.load(shrink_ptr + nearer, mask=is_sent, other=0)
    fine = FRACTION * q - tl.where(q > 0, shrink, tl.where(q < 0, -shrink, 0))
    # Two halves, each of whose sums float32 holds.
    low, high = (fine & 255).to(tl.float32), (fine >> 8).to(tl.float32)
    at = (place * OUTPUTS + c[:, None]) * WIDTH + j[None, :]
    inside = (c < OUTPUTS)[:, None] & (j < WIDTH)[None, :]
    synthesis = tl.load(synthesis_ptr + at, mask=inside, other=0.0)
    sums = tl.dot(high, synthesis, input_precision="tf32x3").to(tl.int32) * 256
    sums += tl.dot(low, synthesis, input_precision="tf32x3").to(tl.int32)
    has_channel = exists[:, None] & (j < WIDTH)[None, :]
    factor = tl.load(factor_ptr + age[:, None] * WIDTH + j[None, :], mask=has_channel, other=0.0)
    mean = tl.load(mean_ptr + place * WIDTH + j, mask=j < WIDTH, other=0.0)
    x = sums.to(tl.float32) * factor + mean[None, :]
    row = (kind * num_tokens + token[:, None]) * channels + group * WIDTH
    tl.store(x_ptr + row + j[None, :], x, mask=has_channel)


@jit("num_tokens", "channels")
def _turn_kernel(
    x_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    bits_ptr: tl.tensor,
    num_tokens: tl.tensor,
    channels: tl.tensor,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Keys to their positions again, and all of it to the cache's dtype."""
    place = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = j < channels
    row = x_ptr + place * channels
    x = tl.load(row + j, mask=exists, other=0.0)
    in_head = j % HEAD_DIM
    is_first, is_turned = in_head < PAIRS, in_head < 2 * PAIRS
    is_key = place < num_tokens
    partner = tl.where(is_first, j + PAIRS, tl.where(is_turned, j - PAIRS, j))
    other = tl.load(row + partner, mask=exists, other=0.0)
    pair = tl.where(is_first, in_head, tl.where(is_turned, in_head - PAIRS, 0))
    angle = (place % num_tokens) * PAIRS + pair
    cos = tl.load(cos_ptr + angle, mask=exists, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=exists, other=0.0)
    turned = tl.where(is_first, x * cos - other * sin, x * cos + other * sin)
    x = tl.where(is_key & is_turned, turned, x)
    tl.store(bits_ptr + place * channels + j, narrowed(x, KIND), mask=exists)
