"""RMSNorm, with the residual addition before it.

x: ``[T, h]``, rows may be strided. weight: ``[h]`` (Gemma's is stored as 1 + w). residual:
``[T, h]`` of x's dtype, or None. Returns (normed, sum): ``sum = residual + x``, rounded to x's
dtype, or x itself without a residual; ``normed = sum / sqrt(mean(sum^2) + eps) * weight``,
computed in float32 and rounded once. No argument is written to.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    total = x if residual is None else residual + x
    wide = total.float()
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * inverse * weight.float()).to(x.dtype), total
