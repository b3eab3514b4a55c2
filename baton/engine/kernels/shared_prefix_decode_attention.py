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

from baton.engine.kernels.jit import INTERPRETED, jit_sizes, power_of_two, tl
from baton.engine.kernels.online_softmax import score_factors, scores_log2, softmax_step
from baton.engine.kernels.paged_decode_attention import (
    SPLIT_TOKENS,
    decode_splits,
    paged_decode_attention_reference,
)
from baton.engine.kernels.split_merge import Partials, merge_splits

BLOCK_M = 64
"""Rows of the products: a KV head's queries of many sequences. Fixed, whatever the batch."""
BLOCK_N = 64
NARROW_BLOCK_N = 16
"""float32, and heads above 128: accumulators fill the registers."""


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


def shared_prefix_decode_attention_triton(
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
    block_size = key_blocks.shape[1]
    prefix_len = len(prefix_table) * block_size
    num_prefix_splits = -(-prefix_len // SPLIT_TOKENS)
    num_suffix_splits = -(-block_tables.shape[1] * block_size // SPLIT_TOKENS)
    partials = Partials.empty(q, num_splits=num_prefix_splits + num_suffix_splits)
    _prefix_splits(
        partials, q, key_blocks, value_blocks, prefix_table, scale=scale, soft_cap=soft_cap
    )
    decode_splits(
        partials,
        q,
        key_blocks,
        value_blocks,
        block_tables,
        context_lens,
        first_split=num_prefix_splits,
        prefix_len=prefix_len,
        scale=scale,
        window=None,
        soft_cap=soft_cap,
    )
    return merge_splits(
        partials,
        q,
        context_lens,
        split_tokens=SPLIT_TOKENS,
        num_prefix_splits=num_prefix_splits,
        prefix_len=prefix_len,
        window=None,
    )


def _prefix_splits(
    partials: Partials,
    q: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    prefix_table: Tensor,
    *,
    scale: float,
    soft_cap: float | None,
) -> None:
    num_rows, num_heads, head_dim = q.shape
    block_size, num_kv_heads = key_blocks.shape[1:3]
    prefix_len = len(prefix_table) * block_size
    if num_rows == 0 or prefix_len == 0:
        return
    assert q.stride(2) == 1
    assert key_blocks.is_contiguous()
    assert value_blocks.is_contiguous()
    inner, outer = score_factors(scale, soft_cap)
    group = num_heads // num_kv_heads
    tiles = -(-num_rows * group // BLOCK_M)
    _prefix_split_kernel[(tiles, num_kv_heads, -(-prefix_len // SPLIT_TOKENS))](
        partials.mixed,
        partials.row_max,
        partials.row_sum,
        q,
        key_blocks,
        value_blocks,
        prefix_table,
        inner,
        outer,
        num_rows,
        prefix_len,
        partials.num_splits,
        q.stride(0),
        q.stride(1),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        SPLIT=SPLIT_TOKENS,
        BLOCK_M=BLOCK_M,
        BLOCK_N=NARROW_BLOCK_N if q.dtype == torch.float32 or head_dim > 128 else BLOCK_N,
        BLOCK_D=power_of_two(head_dim, least=16),
        HAS_CAP=soft_cap is not None,
        DOT_IN_FP32=INTERPRETED,
        num_warps=4,
        num_stages=5,
    )


@jit_sizes("num_rows", "prefix_len", "num_splits", tables=("table_ptr",))
def _prefix_split_kernel(
    mixed_ptr: tl.tensor,
    max_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    q_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    table_ptr: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    num_rows: tl.tensor,
    prefix_len: tl.tensor,
    num_splits: tl.tensor,
    q_row_stride: tl.tensor,
    q_head_stride: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_CAP: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,
) -> None:
    """One split of the prefix for BLOCK_M queries of one KV head, GROUP of each sequence."""
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    queries = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = (queries // GROUP).to(tl.int64)
    in_rows = rows < num_rows
    heads = kv_head * GROUP + queries % GROUP
    columns = tl.arange(0, BLOCK_D)
    in_head = columns < HEAD_DIM
    q_places = q_ptr + rows[:, None] * q_row_stride + heads[:, None] * q_head_stride
    q_mask = in_rows[:, None] & in_head[None, :]
    q = tl.load(q_places + columns[None, :], mask=q_mask, other=0.0)
    if DOT_IN_FP32:
        q = q.to(tl.float32)
    first = split * SPLIT
    stop = tl.minimum(first + SPLIT, prefix_len)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for tile in range(first, stop, BLOCK_N):
        keys = tile + tl.arange(0, BLOCK_N)
        seen = keys < stop
        blocks = tl.load(table_ptr + keys // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        tokens = blocks * BLOCK_SIZE + keys % BLOCK_SIZE
        places = (tokens * NUM_KV_HEADS + kv_head) * HEAD_DIM
        k_mask = seen[None, :] & in_head[:, None]
        k = tl.load(key_ptr + places[None, :] + columns[:, None], mask=k_mask, other=0.0)
        v_mask = seen[:, None] & in_head[None, :]
        v = tl.load(value_ptr + places[:, None] + columns[None, :], mask=v_mask, other=0.0)
        if DOT_IN_FP32:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = scores_log2(tl.dot(q, k, input_precision="ieee"), inner, outer, HAS_CAP)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        weights, factor, row_max, row_sum = softmax_step(scores, row_max, row_sum, False)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * factor[:, None], input_precision="ieee")

    parts = (rows * NUM_HEADS + heads) * num_splits + split
    tl.store(max_ptr + parts, row_max, mask=in_rows)
    tl.store(sum_ptr + parts, row_sum, mask=in_rows)
    part_places = mixed_ptr + parts[:, None] * HEAD_DIM + columns[None, :]
    tl.store(part_places, mixed, mask=in_rows[:, None] & in_head[None, :])
