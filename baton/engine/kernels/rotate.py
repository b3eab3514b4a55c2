"""Rotary position embedding of packed heads.

heads: ``[T, N, D]``, the last dimension contiguous, rows may be strided (a view of one fused
product). cos, sin: ``[T, R / 2]`` float32, R <= D. Element i of the first R is rotated against
element ``i + R / 2``; elements from R on pass through (partial rotary). Returns ``[T, N, D]``
contiguous, in the dtype of heads; products are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_reference(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    wide = heads.float()
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    c, s = cos.float()[:, None], sin.float()[:, None]
    turned = torch.cat((first * c - second * s, second * c + first * s, rest), dim=-1)
    return turned.to(heads.dtype)
