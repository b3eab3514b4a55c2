"""Attention computed in splits of the keys, and their merge by log-sum-exp.

A split holds, per row and query head, the maximum score m (units of log2), the sum l of
``exp2(score - m)`` and the values weighted alike, not divided by l. The whole is
``sum(mixed_s * exp2(m_s - M)) / sum(l_s * exp2(m_s - M))`` with M the greatest m.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baton.engine.kernels.jit import jit_sizes, power_of_two, tl


@dataclass(frozen=True, slots=True)
class Partials:
    """float32. row_max, row_sum: ``[B, H, splits]``; mixed: ``[B, H, splits, D]``."""

    row_max: Tensor
    row_sum: Tensor
    mixed: Tensor

    @classmethod
    def empty(cls, q: Tensor, *, num_splits: int) -> Partials:
        shape = (q.shape[0], q.shape[1], num_splits)
        return cls(
            row_max=torch.empty(shape, dtype=torch.float32, device=q.device),
            row_sum=torch.empty(shape, dtype=torch.float32, device=q.device),
            mixed=torch.empty((*shape, q.shape[2]), dtype=torch.float32, device=q.device),
        )

    @property
    def num_splits(self) -> int:
        return self.row_max.shape[2]


def merge_splits(
    partials: Partials,
    q: Tensor,
    context_lens: Tensor,
    *,
    split_tokens: int,
    window: int | None,
) -> Tensor:
    """``[B, H, D]`` in q's dtype. Of a row's splits those count that hold a visible key; what the
    rest hold is not read."""
    num_rows, num_heads, head_dim = q.shape
    out = torch.empty((num_rows, num_heads, head_dim), dtype=q.dtype, device=q.device)
    if num_rows == 0:
        return out
    _merge_kernel[(num_rows, num_heads)](
        out,
        partials.row_max,
        partials.row_sum,
        partials.mixed,
        context_lens,
        partials.num_splits,
        window or 0,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=power_of_two(head_dim),
        SPLIT=split_tokens,
        HAS_WINDOW=window is not None,
        num_warps=1,
    )
    return out


@jit_sizes("num_splits", "window", tables=("context_ptr",))
def _merge_kernel(
    out_ptr: tl.tensor,
    max_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    mixed_ptr: tl.tensor,
    context_ptr: tl.tensor,
    num_splits: tl.tensor,
    window: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    whole = row * NUM_HEADS + tl.program_id(1)
    columns = tl.arange(0, BLOCK_D)
    in_head = columns < HEAD_DIM
    num_keys = tl.load(context_ptr + row)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(0, num_keys - window) // SPLIT
    num_parts = (num_keys + SPLIT - 1) // SPLIT
    greatest = float("-inf")
    for part in range(begin, num_parts):
        greatest = tl.maximum(greatest, tl.load(max_ptr + whole * num_splits + part))
    total = 0.0
    mixed = tl.zeros((BLOCK_D,), tl.float32)
    for part in range(begin, num_parts):
        place = whole * num_splits + part
        factor = tl.exp2(tl.load(max_ptr + place) - greatest)
        total += tl.load(sum_ptr + place) * factor
        mixed += tl.load(mixed_ptr + place * HEAD_DIM + columns, mask=in_head) * factor
    # A padding row has no parts: 0 / 1.
    total = tl.where(num_parts > begin, total, 1.0)
    result = (mixed / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + whole * HEAD_DIM + columns, result, mask=in_head)
