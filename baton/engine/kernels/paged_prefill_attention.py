"""Causal attention of variable-length chunks over paged KV that already holds the chunks' rows.

q: ``[T, H, D]``, the chunks of S sequences one after the other. cu_seqlens_q: ``[S + 1]`` int32,
where each chunk begins in q; its last entry is T at most (rows past it are padding, and what
comes back for them is unspecified). context_lens: ``[S]`` int32, tokens of each sequence after
this chunk: its last row's position is ``context_len - 1``. key_blocks, value_blocks:
``[N, BS, K, D]``, contiguous. block_tables: ``[S, M]`` int32. scale, window and soft_cap as in
``paged_decode_attention``. Returns ``[T, H, D]`` in q's dtype. Slots past a context may hold
anything, NaN too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.engine.kernels.paged_decode_attention import attend_row_tile, rows_of


def paged_prefill_attention_reference(
    q: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    out = torch.zeros_like(q)
    starts = cu_seqlens_q.tolist()
    for seq, end in enumerate(context_lens.tolist()):
        rows = slice(starts[seq], starts[seq + 1])
        num_rows = rows.stop - rows.start
        keys = rows_of(key_blocks, block_tables[seq], 0, end)
        values = rows_of(value_blocks, block_tables[seq], 0, end)
        query_positions = torch.arange(end - num_rows, end, device=q.device)[:, None]
        key_positions = torch.arange(end, device=q.device)
        visible = key_positions <= query_positions
        if window is not None:
            visible &= key_positions > query_positions - window
        out[rows] = attend_row_tile(q[rows], keys, values, visible, scale, soft_cap)
    return out
