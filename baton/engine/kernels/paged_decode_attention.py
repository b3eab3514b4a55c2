"""Attention of one query per sequence over its paged KV.

q: ``[B, H, D]``. key_blocks, value_blocks: ``[N, BS, K, D]``, contiguous, H a multiple of K;
query head h reads KV head ``h // (H / K)``. block_tables: ``[B, M]`` int32; entries past a
sequence's context are never read as blocks. context_lens: ``[B]`` int32, tokens with the
query's own, whose position is ``context_len - 1``; 0 marks a padding row, whose result is 0.
scale multiplies q . k. window w: key j is visible iff ``position - w < j <= position``.
soft_cap c: scores become ``c * tanh(score / c)``. Returns ``[B, H, D]`` in q's dtype.
Slots past a context may hold anything, NaN too.
"""

from __future__ import annotations

import torch
from torch import Tensor


def paged_decode_attention_reference(
    q: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    out = torch.zeros_like(q)
    for row, end in enumerate(context_lens.tolist()):
        first = 0 if window is None else max(0, end - window)
        if end == 0:
            continue
        keys = rows_of(key_blocks, block_tables[row], first, end)
        values = rows_of(value_blocks, block_tables[row], first, end)
        out[row] = attend_row_tile(q[row][None], keys, values, None, scale, soft_cap)[0]
    return out


def rows_of(blocks: Tensor, block_table: Tensor, first: int, end: int) -> Tensor:
    """Rows ``[end - first, K, D]`` float32 of positions ``first .. end - 1``."""
    block_size = blocks.shape[1]
    positions = torch.arange(first, end, device=blocks.device)
    block_ids = block_table.long()[positions // block_size]
    return blocks[block_ids, positions % block_size].float()


def attend_row_tile(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor | None,
    scale: float,
    soft_cap: float | None,
) -> Tensor:
    """q: ``[T, H, D]``; keys, values: ``[L, K, D]``; visible: ``[T, L]`` bool. ``[T, H, D]``."""
    group_size = q.shape[1] // keys.shape[1]
    scores = torch.einsum("thd,lhd->htl", q.float(), keys.repeat_interleave(group_size, 1)) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = scores.softmax(dim=-1)
    mixed = torch.einsum("htl,lhd->thd", weights, values.repeat_interleave(group_size, 1))
    return mixed.to(q.dtype)
