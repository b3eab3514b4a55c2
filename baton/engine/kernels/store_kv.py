"""Store new K and V rows into the slots of one layer's paged cache.

k, v: ``[T, K, D]``; a row's K * D numbers are contiguous, rows may be strided (views of one fused
product). key_blocks, value_blocks: ``[N, BS, K, D]``, contiguous, of the dtype of k and v.
slots: ``[T]`` int64, ``block * BS + offset``. Slot -1: the row is padding and is skipped.
No two rows may name the same slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.engine.kernels.jit import jit_sizes, power_of_two, tl

TOKENS_PER_PROGRAM = 4
INTEGER_OF_BYTES = {1: torch.int8, 2: torch.int16, 4: torch.int32}
"""Copies move integers of the same width: no rounding, and no special case for bfloat16."""


def store_kv_reference(
    k: Tensor, v: Tensor, key_blocks: Tensor, value_blocks: Tensor, slots: Tensor
) -> None:
    used = slots >= 0
    places = slots[used]
    key_blocks.flatten(0, 1)[places] = k[used]
    value_blocks.flatten(0, 1)[places] = v[used]


def store_kv_triton(
    k: Tensor, v: Tensor, key_blocks: Tensor, value_blocks: Tensor, slots: Tensor
) -> None:
    num_rows, width = k.shape[0], k.shape[1] * k.shape[2]
    if num_rows == 0:
        return
    assert k.dtype == v.dtype == key_blocks.dtype == value_blocks.dtype
    assert key_blocks.is_contiguous()
    assert value_blocks.is_contiguous()
    integer = INTEGER_OF_BYTES[k.element_size()]
    _store_kv_kernel[(-(-num_rows // TOKENS_PER_PROGRAM),)](
        k.flatten(1).view(integer),
        v.flatten(1).view(integer),
        key_blocks.view(integer),
        value_blocks.view(integer),
        slots,
        num_rows,
        k.stride(0),
        v.stride(0),
        WIDTH=width,
        BLOCK_WIDTH=power_of_two(width),
        TOKENS=TOKENS_PER_PROGRAM,
    )


@jit_sizes("num_rows", tables=("slots_ptr",))
def _store_kv_kernel(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    key_blocks_ptr: tl.tensor,
    value_blocks_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    num_rows: tl.tensor,
    k_row_stride: tl.tensor,
    v_row_stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slots = tl.load(slots_ptr + rows, mask=rows < num_rows, other=-1).to(tl.int64)
    columns = tl.arange(0, BLOCK_WIDTH)
    used = (slots >= 0)[:, None] & (columns < WIDTH)[None, :]
    sources = rows.to(tl.int64)[:, None]
    places = slots[:, None] * WIDTH + columns[None, :]
    k = tl.load(k_ptr + sources * k_row_stride + columns[None, :], mask=used)
    tl.store(key_blocks_ptr + places, k, mask=used)
    v = tl.load(v_ptr + sources * v_row_stride + columns[None, :], mask=used)
    tl.store(value_blocks_ptr + places, v, mask=used)
