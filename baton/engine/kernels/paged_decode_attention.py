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

from baton.engine.kernels.jit import INTERPRETED, jit_sizes, power_of_two, tl
from baton.engine.kernels.online_softmax import score_factors, scores_log2, softmax_step
from baton.engine.kernels.paged_tiles import load_kv
from baton.engine.kernels.split_merge import Partials, merge_splits

SPLIT_TOKENS = 512
"""A sequence's keys are cut into splits of this length, counted from its first key, and merged
in order. The length is fixed, not chosen from the batch: so a row's sum has one order, whatever
runs beside it, and a single long sequence still fills the device."""
BLOCK_N = 64
BLOCK_N_FLOAT32 = 16
NUM_WARPS = 4
NUM_STAGES = 5
"""Two stages go by before a key's load is begun: its address comes from the block table."""


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


def paged_decode_attention_triton(
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
    num_tokens = block_tables.shape[1] * key_blocks.shape[1]
    partials = Partials.empty(q, num_splits=-(-num_tokens // SPLIT_TOKENS))
    decode_splits(
        partials,
        q,
        key_blocks,
        value_blocks,
        block_tables,
        context_lens,
        None,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
    )
    return merge_splits(partials, q, context_lens, split_tokens=SPLIT_TOKENS, window=window)


def decode_splits(
    partials: Partials,
    q: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    prefix_lens: Tensor | None,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> None:
    """Fill ``partials``, but for splits without a visible key and, with ``prefix_lens`` (``[B]``
    int32, multiples of ``SPLIT_TOKENS``), those of a row's first so many keys."""
    num_rows, num_heads, head_dim = q.shape
    block_size, num_kv_heads = key_blocks.shape[1:3]
    num_splits = partials.num_splits
    if num_rows == 0 or num_splits == 0:
        return
    assert q.stride(2) == 1
    assert key_blocks.is_contiguous()
    assert value_blocks.is_contiguous()
    assert block_tables.stride(1) == 1
    inner, outer = score_factors(scale, soft_cap)
    group = num_heads // num_kv_heads
    _decode_split_kernel[(num_kv_heads, num_splits, num_rows)](
        partials.mixed,
        partials.row_max,
        partials.row_sum,
        q,
        key_blocks,
        value_blocks,
        block_tables,
        context_lens,
        context_lens if prefix_lens is None else prefix_lens,
        inner,
        outer,
        window or 0,
        num_splits,
        q.stride(0),
        q.stride(1),
        block_tables.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        SPLIT=SPLIT_TOKENS,
        BLOCK_M=power_of_two(group, least=16),
        BLOCK_N=BLOCK_N_FLOAT32 if q.dtype == torch.float32 else BLOCK_N,
        BLOCK_D=power_of_two(head_dim, least=16),
        HAS_PREFIX=prefix_lens is not None,
        HAS_WINDOW=window is not None,
        HAS_CAP=soft_cap is not None,
        DOT_IN_FP32=INTERPRETED,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )


@jit_sizes(
    "window",
    "num_splits",
    "table_stride",
    tables=("tables_ptr", "context_ptr", "prefix_ptr"),
)
def _decode_split_kernel(
    mixed_ptr: tl.tensor,
    max_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    q_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    context_ptr: tl.tensor,
    prefix_ptr: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    window: tl.tensor,
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
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,
) -> None:
    """One split of one row and KV head; the head's GROUP queries are the rows of the products.

    Neighbouring programs take the KV heads of the same tokens, which lie side by side in memory.
    """
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    first = split * SPLIT
    num_keys = tl.load(context_ptr + row)
    stop = tl.minimum(first + SPLIT, num_keys)
    if HAS_PREFIX:
        stop = tl.where(first < tl.load(prefix_ptr + row), first, stop)
    begin = first
    if HAS_WINDOW:
        begin = tl.maximum(first, num_keys - window)
    if begin >= stop:
        return

    group_rows = tl.arange(0, BLOCK_M)
    in_group = group_rows < GROUP
    heads = kv_head * GROUP + group_rows
    columns = tl.arange(0, BLOCK_D)
    in_head = columns < HEAD_DIM
    q_places = q_ptr + row * q_row_stride + heads[:, None] * q_head_stride + columns[None, :]
    q = tl.load(q_places, mask=in_group[:, None] & in_head[None, :], other=0.0)
    if DOT_IN_FP32:
        q = q.to(tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    table = tables_ptr + row * table_stride
    key_ptr += kv_head * HEAD_DIM
    value_ptr += kv_head * HEAD_DIM
    # Each tile holds a visible key: the first one holds ``begin``, the others their own first.
    for tile in range(first + (begin - first) // BLOCK_N * BLOCK_N, stop, BLOCK_N):
        keys = tile + tl.arange(0, BLOCK_N)
        seen = (keys >= begin) & (keys < stop)
        k, v = load_kv(
            key_ptr, value_ptr, table, keys, seen,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_D, True, DOT_IN_FP32,
        )  # fmt: skip
        scores = scores_log2(tl.dot(q, k, input_precision="ieee"), inner, outer, HAS_CAP)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        weights, factor, row_max, row_sum = softmax_step(scores, row_max, row_sum, False)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * factor[:, None], input_precision="ieee")

    parts = (row * NUM_HEADS + heads) * num_splits + split
    tl.store(max_ptr + parts, row_max, mask=in_group)
    tl.store(sum_ptr + parts, row_sum, mask=in_group)
    part_places = mixed_ptr + parts[:, None] * HEAD_DIM + columns[None, :]
    tl.store(part_places, mixed, mask=in_group[:, None] & in_head[None, :])
