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

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baton.engine.kernels.jit import INTERPRETED, jit, jit_sizes, power_of_two, tl
from baton.engine.kernels.online_softmax import score_factors, scores_log2, softmax_step
from baton.engine.kernels.paged_decode_attention import attend_row_tile, rows_of
from baton.engine.kernels.paged_tiles import load_kv
from baton.engine.kernels.segments import find_segment


@dataclass(frozen=True, slots=True)
class Tile:
    """Query rows (tokens times the queries of a KV head) by keys. Fixed per dtype: the order in
    which a row's keys are summed must not depend on what runs beside it. Stages: the addresses of
    keys come from the block table, so two of them go by before a key's load is even begun."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


HALF_TILE = Tile(rows=128, keys=64, num_warps=8, num_stages=5)
WIDE_HEAD_TILE = Tile(rows=128, keys=32, num_warps=8, num_stages=5)
"""Heads above 128: accumulators fill the registers."""
FLOAT32_TILE = Tile(rows=32, keys=16, num_warps=8, num_stages=3)


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
        first = 0 if window is None else max(0, end - num_rows - window + 1)
        keys = rows_of(key_blocks, block_tables[seq], first, end)
        values = rows_of(value_blocks, block_tables[seq], first, end)
        query_positions = torch.arange(end - num_rows, end, device=q.device)[:, None]
        key_positions = torch.arange(first, end, device=q.device)
        visible = key_positions <= query_positions
        if window is not None:
            visible &= key_positions > query_positions - window
        out[rows] = attend_row_tile(q[rows], keys, values, visible, scale, soft_cap)
    return out


def paged_prefill_attention_triton(
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
    num_rows, num_heads, head_dim = q.shape
    block_size, num_kv_heads = key_blocks.shape[1:3]
    num_seqs = len(context_lens)
    out = torch.empty((num_rows, num_heads, head_dim), dtype=q.dtype, device=q.device)
    if num_rows == 0 or num_seqs == 0:
        return out
    assert q.stride(2) == 1
    assert key_blocks.is_contiguous()
    assert value_blocks.is_contiguous()
    assert block_tables.stride(1) == 1
    inner, outer = score_factors(scale, soft_cap)
    group = num_heads // num_kv_heads
    tile = _tile_for(q.dtype, head_dim)
    rows = power_of_two(group, least=tile.rows)
    grid = (num_rows // (rows // group) + num_seqs, num_kv_heads)
    _prefill_kernel[grid](
        out,
        q,
        key_blocks,
        value_blocks,
        block_tables,
        cu_seqlens_q,
        context_lens,
        num_seqs,
        inner,
        outer,
        window or 0,
        q.stride(0),
        q.stride(1),
        block_tables.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=rows,
        BLOCK_Q=rows // group,
        BLOCK_N=tile.keys,
        BLOCK_D=power_of_two(head_dim, least=16),
        HAS_WINDOW=window is not None,
        HAS_CAP=soft_cap is not None,
        DOT_IN_FP32=INTERPRETED,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def _tile_for(dtype: torch.dtype, head_dim: int) -> Tile:
    if dtype == torch.float32:
        return FLOAT32_TILE
    return HALF_TILE if head_dim <= 128 else WIDE_HEAD_TILE


@jit_sizes("num_seqs", "window", "table_stride", tables=("tables_ptr", "starts_ptr", "context_ptr"))
def _prefill_kernel(
    out_ptr: tl.tensor,
    q_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    context_ptr: tl.tensor,
    num_seqs: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    window: tl.tensor,
    q_row_stride: tl.tensor,
    q_head_stride: tl.tensor,
    table_stride: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,
) -> None:
    """BLOCK_Q tokens of one sequence, with the GROUP queries of one KV head each, as the rows of
    the products: keys and values are read once for the whole group.

    Later tiles of a causal chunk see more keys, so they start first.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    seq = find_segment(starts_ptr, num_seqs, tile, BLOCK_Q)
    start = tl.load(starts_ptr + seq)
    num_queries = tl.load(starts_ptr + seq + 1) - start
    first_query = (tile - start // BLOCK_Q - seq) * BLOCK_Q
    if first_query >= num_queries:
        return

    tile_rows = tl.arange(0, BLOCK_M)
    tokens = tile_rows // GROUP
    heads = kv_head * GROUP + tile_rows % GROUP
    in_rows = (tokens < BLOCK_Q) & (first_query + tokens < num_queries)
    columns = tl.arange(0, BLOCK_D)
    q_mask = in_rows[:, None] & (columns < HEAD_DIM)[None, :]
    rows = (start + first_query + tokens).to(tl.int64)
    q_places = q_ptr + rows[:, None] * q_row_stride + heads[:, None] * q_head_stride
    q = tl.load(q_places + columns[None, :], mask=q_mask, other=0.0)
    if DOT_IN_FP32:
        q = q.to(tl.float32)

    first_position = tl.load(context_ptr + seq) - num_queries + first_query
    positions = first_position + tokens
    # Keys from ``begin`` to below ``stop`` are visible to some row; those from ``whole_begin`` to
    # below ``whole_stop``, whole tiles, to every row: only the tiles around these need a mask.
    stop = first_position + tl.minimum(BLOCK_Q, num_queries - first_query)
    first = 0
    begin = 0
    whole_begin = 0
    if HAS_WINDOW:
        first = tl.maximum(0, first_position - window + 1)
        begin = first // BLOCK_N * BLOCK_N
        whole_begin = tl.maximum(0, stop - window)
        whole_begin = (whole_begin + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    whole_stop = tl.maximum(whole_begin, (first_position + 1) // BLOCK_N * BLOCK_N)

    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    table = tables_ptr + seq.to(tl.int64) * table_stride
    key_ptr += kv_head * HEAD_DIM
    value_ptr += kv_head * HEAD_DIM
    if HAS_WINDOW:
        row_max, row_sum, mixed = _fold_keys(
            row_max, row_sum, mixed, q, positions, key_ptr, value_ptr, table,
            begin, tl.minimum(whole_begin, stop), first, stop, inner, outer, window,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D,
            True, HAS_WINDOW, HAS_CAP, DOT_IN_FP32,
        )  # fmt: skip
    row_max, row_sum, mixed = _fold_keys(
        row_max, row_sum, mixed, q, positions, key_ptr, value_ptr, table,
        whole_begin, whole_stop, first, stop, inner, outer, window,
        NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D,
        False, HAS_WINDOW, HAS_CAP, DOT_IN_FP32,
    )  # fmt: skip
    row_max, row_sum, mixed = _fold_keys(
        row_max, row_sum, mixed, q, positions, key_ptr, value_ptr, table,
        whole_stop, stop, first, stop, inner, outer, window,
        NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D,
        True, HAS_WINDOW, HAS_CAP, DOT_IN_FP32,
    )  # fmt: skip

    row_sum = tl.where(in_rows, row_sum, 1.0)
    result = (mixed / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    out_places = out_ptr + (rows * NUM_HEADS + heads)[:, None] * HEAD_DIM + columns[None, :]
    tl.store(out_places, result, mask=q_mask)


@jit
def _fold_keys(
    row_max: tl.tensor,
    row_sum: tl.tensor,
    mixed: tl.tensor,
    q: tl.tensor,
    positions: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    table: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    first: tl.tensor,
    num_keys: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    window: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,
) -> Any:
    """Keys ``begin .. end - 1`` in tiles. What is before ``first``, or from ``num_keys`` on, is
    never read: such rows may hold anything."""
    for tile in range(begin, end, BLOCK_N):
        keys = tile + tl.arange(0, BLOCK_N)
        stored = tl.full((BLOCK_N,), True, tl.int1)
        if MASKED:
            stored = (keys >= first) & (keys < num_keys)
        k, v = load_kv(
            key_ptr, value_ptr, table, keys, stored,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_D, MASKED, DOT_IN_FP32,
        )  # fmt: skip
        scores = scores_log2(tl.dot(q, k, input_precision="ieee"), inner, outer, HAS_CAP)
        if MASKED:
            visible = keys[None, :] <= positions[:, None]
            if HAS_WINDOW:
                visible &= keys[None, :] > positions[:, None] - window
            scores = tl.where(visible, scores, float("-inf"))
        weights, factor, row_max, row_sum = softmax_step(scores, row_max, row_sum, MASKED)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * factor[:, None], input_precision="ieee")
    return row_max, row_sum, mixed
