"""``int8``, ``int4`` and ``fp8`` on a GPU; the arithmetic of ``int_groups`` and ``fp8_reference``.

Launched with ``enable_fp_fusion=False``: a fused multiply and add rounds once where the host
rounds twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_transfer.codecs.gpu.floats import BLOCK, KINDS, narrowed, widened
from kv_transfer.codecs.gpu.jit import jit, power_of_two, tl
from kv_transfer.codecs.int_groups import GROUP_TOKENS, num_groups
from kv_transfer.codecs.nibbles import packed_width

_CHANNELS = 64


def quantise(bits: Tensor, dtype: str, num_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(steps, zeros, codes): int16 ``[runs, groups, channels]`` twice, and uint8
    ``[runs, tokens, channels]``, or half as wide for 4 bits. bits: ``[runs, tokens, channels]``."""
    runs, tokens, channels = bits.shape
    width = channels if num_bits == 8 else packed_width(channels)
    groups = num_groups(tokens)
    steps = torch.empty((runs, groups, channels), dtype=torch.int16, device=bits.device)
    zeros = torch.empty_like(steps)
    codes = torch.empty((runs, tokens, width), dtype=torch.uint8, device=bits.device)
    _quantise_kernel[(runs, groups, -(-width // _CHANNELS))](
        bits, steps, zeros, codes, tokens, channels, width, groups,
        PARTS=8 // num_bits, LEVELS=2**num_bits - 1, KIND=KINDS[dtype],
        TOKENS=GROUP_TOKENS, CHANNELS=min(_CHANNELS, power_of_two(width)),
        enable_fp_fusion=False,
    )  # fmt: skip
    return steps, zeros, codes


def restore(steps: Tensor, zeros: Tensor, codes: Tensor, dtype: str, bits: Tensor) -> None:
    """Fills ``bits``."""
    runs, tokens, channels = bits.shape
    width, groups = codes.shape[2], steps.shape[1]
    _restore_kernel[(runs, groups, -(-width // _CHANNELS))](
        steps, zeros, codes, bits, tokens, channels, width, groups,
        PARTS=1 if width == channels else 2, KIND=KINDS[dtype],
        TOKENS=GROUP_TOKENS, CHANNELS=min(_CHANNELS, power_of_two(width)),
        enable_fp_fusion=False,
    )  # fmt: skip


def to_e4m3(bits: Tensor, dtype: str, scales: Tensor) -> Tensor:
    """uint8 ``[runs, n]``. bits: ``[runs, n]``. scales: float32 ``[runs]``, powers of two."""
    runs, n = bits.shape
    codes = torch.empty((runs, n), dtype=torch.uint8, device=bits.device)
    _e4m3_kernel[(runs, -(-n // BLOCK))](
        bits, scales, codes, n, KIND=KINDS[dtype], BLOCK=BLOCK, enable_fp_fusion=False
    )
    return codes


def look_up(codes: Tensor, tables: Tensor, bits: Tensor) -> None:
    """Fills ``bits`` ``[runs, n]`` from each run's table, ``[runs, 256]`` of the same dtype."""
    runs, n = bits.shape
    _look_up_kernel[(runs, -(-n // BLOCK))](codes, tables, bits, n, BLOCK=BLOCK)


@jit()
def _rounded(x: tl.tensor) -> tl.tensor:
    return (x + 12582912.0) - 12582912.0


@jit()
def _quantised(
    bits_run: tl.tensor,
    steps_group: tl.tensor,
    zeros_group: tl.tensor,
    row: tl.tensor,
    is_row: tl.tensor,
    channel: tl.tensor,
    is_channel: tl.tensor,
    channels: tl.tensor,
    LEVELS: tl.constexpr,
    KIND: tl.constexpr,
) -> tl.tensor:
    """Codes ``[TOKENS, CHANNELS]``; writes steps and zeros."""
    is_used = is_row[:, None] & is_channel[None, :]
    place = row[:, None] * channels + channel[None, :]
    x = widened(tl.load(bits_run + place, mask=is_used, other=0), KIND)
    low = tl.min(tl.where(is_row[:, None], x, float("inf")), 0)
    high = tl.max(tl.where(is_row[:, None], x, float("-inf")), 0)
    size = tl.maximum(-low, high)
    share: tl.constexpr = 1.0 / LEVELS
    wanted = tl.maximum((high - low) * share, size * 0.00006103515625)
    step = (wanted.to(tl.uint32, bitcast=True) + 0xFFFF) >> 16
    step = tl.where(size < 7.888609052210118e-31, 0, step)
    as_float = (step << 16).to(tl.float32, bitcast=True)
    inverse = tl.where(step > 0, tl.div_rn(1.0, tl.where(step > 0, as_float, 1.0)), 0.0)
    zero = _rounded(low * inverse)
    tl.store(steps_group + channel, step.to(tl.uint16).to(tl.int16, bitcast=True), mask=is_channel)
    tl.store(zeros_group + channel, zero.to(tl.int32).to(tl.int16), mask=is_channel)
    code = _rounded(x * inverse[None, :]) - zero[None, :]
    return tl.minimum(tl.maximum(code, 0.0), LEVELS * 1.0).to(tl.int32)


@jit("tokens", "channels", "width", "groups")
def _quantise_kernel(
    bits_ptr: tl.tensor,
    steps_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    width: tl.tensor,
    groups: tl.tensor,
    PARTS: tl.constexpr,
    LEVELS: tl.constexpr,
    KIND: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    run = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    row = group * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    is_row = row < tokens
    bits_run = bits_ptr + run * tokens * channels
    described = (run * groups + group) * channels
    codes = _quantised(
        bits_run, steps_ptr + described, zeros_ptr + described, row, is_row, column,
        column < width, channels, LEVELS, KIND,
    )  # fmt: skip
    if PARTS == 2:
        other = column + width
        is_other = (column < width) & (other < channels)
        high = _quantised(
            bits_run, steps_ptr + described, zeros_ptr + described, row, is_row, other,
            is_other, channels, LEVELS, KIND,
        )  # fmt: skip
        codes = codes | tl.where(is_other[None, :], high << 4, 0)
    place = run * tokens * width + row[:, None] * width + column[None, :]
    is_used = is_row[:, None] & (column < width)[None, :]
    tl.store(codes_ptr + place, codes.to(tl.uint8), mask=is_used)


@jit("tokens", "channels", "width", "groups")
def _restore_kernel(
    steps_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    bits_ptr: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    width: tl.tensor,
    groups: tl.tensor,
    PARTS: tl.constexpr,
    KIND: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    run = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    row = group * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    is_row = row < tokens
    place = run * tokens * width + row[:, None] * width + column[None, :]
    is_used = is_row[:, None] & (column < width)[None, :]
    packed = tl.load(codes_ptr + place, mask=is_used, other=0).to(tl.int32)
    described = (run * groups + group) * channels
    for part in tl.static_range(PARTS):
        channel = column + part * width
        is_channel = (column < width) & (channel < channels)
        step = tl.load(steps_ptr + described + channel, mask=is_channel, other=0)
        zero = tl.load(zeros_ptr + described + channel, mask=is_channel, other=0)
        code = packed if PARTS == 1 else (packed >> (4 * part)) & 15
        value = (code + zero.to(tl.int32)[None, :]).to(tl.float32)
        x = value * (step.to(tl.int32) << 16).to(tl.float32, bitcast=True)[None, :]
        to = bits_ptr + run * tokens * channels + row[:, None] * channels + channel[None, :]
        tl.store(to, narrowed(x, KIND), mask=is_row[:, None] & is_channel[None, :])


@jit("n")
def _e4m3_kernel(
    bits_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    n: tl.tensor,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    run = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = widened(tl.load(bits_ptr + run * n + i, mask=i < n, other=0), KIND)
    bits = (x * tl.load(scales_ptr + run)).to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size + ((size >> 20) & 1) + 0x7FFFF - 1006632960) >> 20
    sum_ = size.to(tl.float32, bitcast=True) + 16384.0
    small = sum_.to(tl.uint32, bitcast=True) - 1182793728
    code = tl.where(size < 1015021568, small, normal) | ((bits >> 24) & 0x80)
    tl.store(codes_ptr + run * n + i, code.to(tl.uint8), mask=i < n)


@jit("n")
def _look_up_kernel(
    codes_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    bits_ptr: tl.tensor,
    n: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    run = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(codes_ptr + run * n + i, mask=i < n, other=0).to(tl.int32)
    tl.store(bits_ptr + run * n + i, tl.load(tables_ptr + run * 256 + code), mask=i < n)
