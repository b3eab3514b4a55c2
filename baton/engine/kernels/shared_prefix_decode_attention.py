"""Decode attention of sequences of which some begin alike (Hydragen, arXiv 2402.05099).

A common prefix is read once for all rows of its group instead of once per row: their queries are
the rows of one product. Each row's other keys are attended to as usual, and a row's parts are
merged by their log-sum-exps. Rows of no group come along in the same launches.

q, key_blocks, value_blocks, block_tables (whole ones, the prefix included), context_lens, scale,
soft_cap and the result as in ``paged_decode_attention``, of which every row's result is a rounding
apart. prefix_lens: ``[B]`` int32, the tokens that a row's group reads for it: a multiple of
``SPLIT_TOKENS`` and below its context, the same for all rows of a group; 0 for a row of none.
group_rows: ``[R]`` int32, the groups' rows one group after the other; a row is in one group at
most. group_starts: ``[G + 1]`` int32, where each group begins in ``group_rows``; the last entry is
R at most, and a group may be empty. The block table of a group's first row serves all of it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from baton.engine.kernels.jit import INTERPRETED, jit_sizes, power_of_two, tl
from baton.engine.kernels.online_softmax import score_factors, scores_log2, softmax_step
from baton.engine.kernels.paged_decode_attention import (
    SPLIT_TOKENS,
    decode_splits,
    paged_decode_attention_reference,
)
from baton.engine.kernels.paged_tiles import load_kv
from baton.engine.kernels.segments import find_segment
from baton.engine.kernels.split_merge import Partials, merge_splits

BLOCK_M = 64
"""Rows of the products: a KV head's queries of many sequences. Fixed, whatever the batch."""
FLOAT32_BLOCK_M = 32
BLOCK_N = 64
NARROW_BLOCK_N = 16
"""float32, and heads above 128: accumulators fill the registers."""


def shared_prefix_decode_attention_reference(
    q: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    prefix_lens: Tensor,
    group_rows: Tensor,
    group_starts: Tensor,
    *,
    scale: float,
    soft_cap: float | None,
) -> Tensor:
    tables, block_size = block_tables.clone(), key_blocks.shape[1]
    for first, stop in pairwise(group_starts.tolist()):
        if first < stop:
            rows = group_rows[first:stop].long()
            num_blocks = -(-int(prefix_lens[rows[0]]) // block_size)
            tables[rows, :num_blocks] = tables[rows[0], :num_blocks]
    return paged_decode_attention_reference(
        q,
        key_blocks,
        value_blocks,
        tables,
        context_lens,
        scale=scale,
        window=None,
        soft_cap=soft_cap,
    )


def shared_prefix_decode_attention_triton(
    q: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    prefix_lens: Tensor,
    group_rows: Tensor,
    group_starts: Tensor,
    *,
    scale: float,
    soft_cap: float | None,
) -> Tensor:
    num_tokens = block_tables.shape[1] * key_blocks.shape[1]
    partials = Partials.empty(q, num_splits=-(-num_tokens // SPLIT_TOKENS))
    _prefix_splits(
        partials,
        q,
        key_blocks,
        value_blocks,
        block_tables,
        prefix_lens,
        group_rows,
        group_starts,
        scale=scale,
        soft_cap=soft_cap,
    )
    decode_splits(
        partials,
        q,
        key_blocks,
        value_blocks,
        block_tables,
        context_lens,
        prefix_lens,
        scale=scale,
        window=None,
        soft_cap=soft_cap,
    )
    return merge_splits(partials, q, context_lens, split_tokens=SPLIT_TOKENS, window=None)


def _prefix_splits(
    partials: Partials,
    q: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    block_tables: Tensor,
    prefix_lens: Tensor,
    group_rows: Tensor,
    group_starts: Tensor,
    *,
    scale: float,
    soft_cap: float | None,
) -> None:
    """Fill those splits of ``partials`` that lie in the prefix of a row's group."""
    num_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = key_blocks.shape[1:3]
    num_groups, num_rows = len(group_starts) - 1, len(group_rows)
    if num_rows == 0 or num_groups < 1 or partials.num_splits == 0:
        return
    assert q.stride(2) == 1
    assert key_blocks.is_contiguous()
    assert value_blocks.is_contiguous()
    assert block_tables.stride(1) == 1
    inner, outer = score_factors(scale, soft_cap)
    group = num_heads // num_kv_heads
    is_float32 = q.dtype == torch.float32
    products = power_of_two(group, least=FLOAT32_BLOCK_M if is_float32 else BLOCK_M)
    # As many tiles as find_segment says are enough, known without asking the device.
    grid = (num_rows // (products // group) + num_groups, num_kv_heads, partials.num_splits)
    _prefix_split_kernel[grid](
        partials.mixed,
        partials.row_max,
        partials.row_sum,
        q,
        key_blocks,
        value_blocks,
        block_tables,
        prefix_lens,
        group_rows,
        group_starts,
        num_groups,
        inner,
        outer,
        partials.num_splits,
        q.stride(0),
        q.stride(1),
        block_tables.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        SPLIT=SPLIT_TOKENS,
        BLOCK_M=products,
        BLOCK_Q=products // group,
        BLOCK_N=NARROW_BLOCK_N if is_float32 or head_dim > 128 else BLOCK_N,
        BLOCK_D=power_of_two(head_dim, least=16),
        HAS_CAP=soft_cap is not None,
        DOT_IN_FP32=INTERPRETED,
        num_warps=8 if is_float32 else 4,
        num_stages=5,
    )


@jit_sizes(
    "num_groups",
    "num_splits",
    "table_stride",
    tables=("tables_ptr", "prefix_ptr", "rows_ptr", "starts_ptr"),
)
def _prefix_split_kernel(
    mixed_ptr: tl.tensor,
    max_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    q_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    prefix_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    num_groups: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    num_splits: tl.tensor,
    q_row_stride: tl.tensor,
    q_head_stride: tl.tensor,
    table_stride: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_CAP: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,
) -> None:
    """One split of a group's prefix for BLOCK_Q of its rows, with the GROUP queries of one KV head
    each. Every split is whole, so nothing is masked."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    group = find_segment(starts_ptr, num_groups, tile, BLOCK_Q)
    start = tl.load(starts_ptr + group)
    num_rows = tl.load(starts_ptr + group + 1) - start
    first_row = (tile - start // BLOCK_Q - group) * BLOCK_Q
    if first_row >= num_rows:
        return
    leader = tl.load(rows_ptr + start).to(tl.int64)
    first = split * SPLIT
    if first >= tl.load(prefix_ptr + leader):
        return

    queries = tl.arange(0, BLOCK_M)
    members = first_row + queries // GROUP
    in_rows = (queries // GROUP < BLOCK_Q) & (members < num_rows)
    rows = tl.load(rows_ptr + start + members, mask=in_rows, other=0).to(tl.int64)
    heads = kv_head * GROUP + queries % GROUP
    columns = tl.arange(0, BLOCK_D)
    q_mask = in_rows[:, None] & (columns < HEAD_DIM)[None, :]
    q_places = q_ptr + rows[:, None] * q_row_stride + heads[:, None] * q_head_stride
    q = tl.load(q_places + columns[None, :], mask=q_mask, other=0.0)
    if DOT_IN_FP32:
        q = q.to(tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    table = tables_ptr + leader * table_stride
    key_ptr += kv_head * HEAD_DIM
    value_ptr += kv_head * HEAD_DIM
    all_keys = tl.full((BLOCK_N,), True, tl.int1)
    for tile_start in range(first, first + SPLIT, BLOCK_N):
        keys = tile_start + tl.arange(0, BLOCK_N)
        k, v = load_kv(
            key_ptr, value_ptr, table, keys, all_keys,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_D, False, DOT_IN_FP32,
        )  # fmt: skip
        scores = scores_log2(tl.dot(q, k, input_precision="ieee"), inner, outer, HAS_CAP)
        weights, factor, row_max, row_sum = softmax_step(scores, row_max, row_sum, False)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * factor[:, None], input_precision="ieee")

    parts = (rows * NUM_HEADS + heads) * num_splits + split
    tl.store(max_ptr + parts, row_max, mask=in_rows)
    tl.store(sum_ptr + parts, row_sum, mask=in_rows)
    part_places = mixed_ptr + parts[:, None] * HEAD_DIM + columns[None, :]
    tl.store(part_places, mixed, mask=q_mask)
