"""RMSNorm, with the residual addition before it.

x: ``[T, h]``, rows may be strided. weight: ``[h]`` (Gemma's is stored as 1 + w). residual:
``[T, h]`` of x's dtype, or None. Returns (normed, sum): ``sum = residual + x``, rounded to x's
dtype, or x itself without a residual; ``normed = sum / sqrt(mean(sum^2) + eps) * weight``,
computed in float32 and rounded once. No argument is written to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.engine.kernels.jit import jit, power_of_two, tl


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    total = x if residual is None else residual + x
    wide = total.float()
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * inverse * weight.float()).to(x.dtype), total


def rms_norm_triton(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    num_rows, width = x.shape
    assert x.stride(1) == 1
    assert residual is None or residual.stride(1) == 1
    normed = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(normed)
    if num_rows == 0:
        return normed, total
    block = power_of_two(width)
    _rms_norm_kernel[(num_rows,)](
        normed,
        total,
        x,
        x if residual is None else residual,
        weight,
        eps,
        x.stride(0),
        x.stride(0) if residual is None else residual.stride(0),
        HAS_RESIDUAL=residual is not None,
        WIDTH=width,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )
    return normed, total


@jit
def _rms_norm_kernel(
    normed_ptr: tl.tensor,
    total_ptr: tl.tensor,
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    eps: tl.tensor,
    x_row_stride: tl.tensor,
    residual_row_stride: tl.tensor,
    HAS_RESIDUAL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    out_type = normed_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        places = residual_ptr + row * residual_row_stride + columns
        residual = tl.load(places, mask=inside, other=0.0).to(tl.float32)
        total = (x + residual).to(out_type)
        tl.store(total_ptr + row * WIDTH + columns, total, mask=inside)
        x = total.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    normed = (x * inverse * weight).to(out_type)
    tl.store(normed_ptr + row * WIDTH + columns, normed, mask=inside)
