"""Rotary position embedding of packed heads.

heads: ``[T, N, D]``, the last dimension contiguous, rows may be strided (a view of one fused
product). cos, sin: ``[T, R / 2]`` contiguous, R <= D. Element i of the first R is rotated against
element ``i + R / 2``; elements from R on pass through (partial rotary). Returns ``[T, N, D]``
contiguous, in the dtype of heads; products are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.engine.kernels.jit import jit, power_of_two, tl


def rotate_reference(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    wide = heads.float()
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    c, s = cos.float()[:, None], sin.float()[:, None]
    turned = torch.cat((first * c - second * s, second * c + first * s, rest), dim=-1)
    return turned.to(heads.dtype)


def rotate_triton(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    num_rows, num_heads, head_dim = heads.shape
    half = cos.shape[-1]
    assert heads.stride(2) == 1
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    out = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    if num_rows == 0:
        return out
    rest = head_dim - 2 * half
    _rotate_kernel[(num_rows,)](
        out,
        heads,
        cos,
        sin,
        heads.stride(0),
        heads.stride(1),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        HALF=half,
        BLOCK_HEADS=power_of_two(num_heads),
        BLOCK_HALF=power_of_two(half),
        BLOCK_REST=power_of_two(rest) if rest else 0,
    )
    return out


@jit
def _rotate_kernel(
    out_ptr: tl.tensor,
    heads_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    out_type = out_ptr.dtype.element_ty
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    columns = tl.arange(0, BLOCK_HALF)
    in_half = columns < HALF
    inside = (heads < NUM_HEADS) & in_half[None, :]
    cos = tl.load(cos_ptr + row * HALF + columns, mask=in_half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + row * HALF + columns, mask=in_half, other=0.0).to(tl.float32)[None, :]
    source = heads_ptr + row * row_stride + heads * head_stride
    target = out_ptr + row * (NUM_HEADS * HEAD_DIM) + heads * HEAD_DIM
    first = tl.load(source + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(target + columns[None, :], (first * cos - second * sin).to(out_type), mask=inside)
    turned = second * cos + first * sin
    tl.store(target + HALF + columns[None, :], turned.to(out_type), mask=inside)
    if BLOCK_REST > 0:
        past = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        inside_rest = (heads < NUM_HEADS) & (past < HEAD_DIM)
        rest = tl.load(source + past, mask=inside_rest, other=0.0).to(tl.float32)
        tl.store(target + past, rest.to(out_type), mask=inside_rest)
