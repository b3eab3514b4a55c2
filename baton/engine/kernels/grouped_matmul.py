"""Each row times the matrix of its expert: the products of a mixture of experts.

x: ``[T, h]``. weights: ``[E, out, h]``, contiguous. expert_of_row: ``[T]`` int32, ascending, so
that an expert's rows lie together; an expert may have none. Returns ``[T, out]`` in x's dtype:
``x[t] @ weights[expert_of_row[t]].T``, accumulated in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baton.engine.kernels.jit import INTERPRETED, jit_sizes, tl
from baton.engine.kernels.segments import find_segment


def grouped_matmul_reference(x: Tensor, weights: Tensor, expert_of_row: Tensor) -> Tensor:
    out = x.new_empty(len(x), weights.shape[1])
    counts = torch.bincount(expert_of_row.long(), minlength=len(weights)).tolist()
    first = 0
    for expert, count in enumerate(counts):
        rows = slice(first, first + count)
        first += count
        if count:
            out[rows] = (x[rows].float() @ weights[expert].float().T).to(x.dtype)
    return out


@dataclass(frozen=True, slots=True)
class Tile:
    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


SMALL = Tile(rows=16, columns=64, depth=128, num_warps=4, num_stages=4)
"""A few rows per expert (decode): time is the reading of weights."""
LARGE = Tile(rows=128, columns=128, depth=64, num_warps=8, num_stages=3)
WIDE = Tile(rows=32, columns=32, depth=32, num_warps=4, num_stages=2)
"""float32: products without tensor cores, small enough for registers."""


def grouped_matmul_triton(x: Tensor, weights: Tensor, expert_of_row: Tensor) -> Tensor:
    num_rows, depth = x.shape
    num_experts, width = weights.shape[:2]
    assert x.stride(1) == 1
    assert weights.is_contiguous()
    out = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    tile = _tile_for(x.dtype, num_rows, num_experts)
    starts = torch.searchsorted(
        expert_of_row,
        torch.arange(num_experts + 1, dtype=expert_of_row.dtype, device=x.device),
        out_int32=True,
    )
    # An expert's rows take at most one tile more than whole tiles of rows do: see find_segment.
    grid = (num_rows // tile.rows + num_experts, -(-width // tile.columns))
    _grouped_matmul_kernel[grid](
        out,
        x,
        weights,
        starts,
        num_experts,
        x.stride(0),
        DEPTH=depth,
        WIDTH=width,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        DOT_IN_FP32=INTERPRETED,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def _tile_for(dtype: torch.dtype, num_rows: int, num_experts: int) -> Tile:
    if dtype == torch.float32:
        return WIDE
    return SMALL if num_rows <= 16 * num_experts else LARGE


@jit_sizes("num_experts")
def _grouped_matmul_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    num_experts: tl.tensor,
    x_row_stride: tl.tensor,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    expert = find_segment(starts_ptr, num_experts, tile, BLOCK_M)
    start = tl.load(starts_ptr + expert)
    end = tl.load(starts_ptr + expert + 1)
    first = start + (tile - start // BLOCK_M - expert) * BLOCK_M
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depths = tl.arange(0, BLOCK_K)
    in_rows = (rows < end)[:, None]
    in_columns = (columns < WIDTH)[None, :]
    x_places = x_ptr + rows.to(tl.int64)[:, None] * x_row_stride + depths[None, :]
    weight_rows = expert.to(tl.int64) * WIDTH + columns
    weight_places = weights_ptr + weight_rows[None, :] * DEPTH + depths[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for done in range(0, DEPTH, BLOCK_K):
        inside = depths < DEPTH - done
        x = tl.load(x_places + done, mask=in_rows & inside[None, :], other=0.0)
        weights = tl.load(weight_places + done, mask=in_columns & inside[:, None], other=0.0)
        if DOT_IN_FP32:
            x, weights = x.to(tl.float32), weights.to(tl.float32)
        total = tl.dot(x, weights, total, input_precision="ieee")
    out_places = out_ptr + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(out_places, total.to(out_ptr.dtype.element_ty), mask=in_rows & in_columns)
