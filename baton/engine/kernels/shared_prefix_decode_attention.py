"""Decode attention of sequences that begin with the same blocks (Hydragen, arXiv 2402.05099).

The common prefix is read once for all rows instead of once per row; each row's own suffix is
attended to as usual, and the two parts are merged by their log-sum-exps.

q: ``[B, H, D]``. key_blocks, value_blocks: ``[N, BS, K, D]``, contiguous. prefix_table: ``[P]``
int32, whole blocks that all B sequences share. block_tables: ``[B, M]`` int32, the blocks after
the prefix. context_lens: ``[B]`` int32, all tokens, prefix and query included, and so above
``P * BS``; 0 marks a padding row, whose result is 0. scale and soft_cap as in
``paged_decode_attention``. Returns ``[B, H, D]`` in q's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.engine.kernels.paged_decode_attention import paged_decode_attention_reference


def shared_prefix_decode_attention_reference(
    q: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    prefix_table: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    soft_cap: float | None,
) -> Tensor:
    prefixes = prefix_table[None].expand(len(q), -1)
    return paged_decode_attention_reference(
        q,
        key_blocks,
        value_blocks,
        torch.cat((prefixes, block_tables), dim=1),
        context_lens,
        scale=scale,
        window=None,
        soft_cap=soft_cap,
    )
