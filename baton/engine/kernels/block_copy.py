"""Tokens between the paged cache and one contiguous buffer: the bytes that go over the wire.

blocks: ``[L, 2 (K, V), N, BS, K, D]``, contiguous. slots: ``[T]`` int64, ``block * BS + offset``.
``gather_blocks`` returns ``[num_layers, 2, T, K, D]`` of layers ``layer_start ..``; slot -1 gives
a row of zeros. ``scatter_blocks`` stores such a tensor (rows, contiguous, of the cache's dtype);
slot -1 is skipped, and no two rows may name the same slot. Bytes are moved as they are.
"""

from __future__ import annotations

from torch import Tensor

from baton.engine.kernels.jit import jit_sizes, power_of_two, tl
from baton.engine.kernels.store_kv import INTEGER_OF_BYTES, TOKENS_PER_PROGRAM


def gather_blocks_reference(
    blocks: Tensor, slots: Tensor, layer_start: int, num_layers: int
) -> Tensor:
    rows = blocks[layer_start : layer_start + num_layers].flatten(2, 3)
    found = rows.index_select(2, slots.clamp_min(0))
    return found.masked_fill_((slots < 0)[:, None, None], 0)


def scatter_blocks_reference(blocks: Tensor, slots: Tensor, layer_start: int, rows: Tensor) -> None:
    used = slots >= 0
    places = blocks[layer_start : layer_start + len(rows)].flatten(2, 3)
    places.index_copy_(2, slots[used], rows[:, :, used])


def gather_blocks_triton(
    blocks: Tensor, slots: Tensor, layer_start: int, num_layers: int
) -> Tensor:
    rows = blocks.new_empty(num_layers, 2, len(slots), *blocks.shape[-2:])
    _copy_rows(blocks, slots, layer_start, rows, into_blocks=False)
    return rows


def scatter_blocks_triton(blocks: Tensor, slots: Tensor, layer_start: int, rows: Tensor) -> None:
    assert rows.dtype == blocks.dtype
    assert rows.is_contiguous()
    _copy_rows(blocks, slots, layer_start, rows, into_blocks=True)


def _copy_rows(
    blocks: Tensor, slots: Tensor, layer_start: int, rows: Tensor, *, into_blocks: bool
) -> None:
    if rows.numel() == 0:
        return
    assert blocks.is_contiguous()
    integer = INTEGER_OF_BYTES[blocks.element_size()]
    width = blocks.shape[-2] * blocks.shape[-1]
    num_sides = 2 * rows.shape[0]
    _copy_rows_kernel[(-(-len(slots) // TOKENS_PER_PROGRAM), num_sides)](
        blocks[layer_start : layer_start + rows.shape[0]].view(integer),
        rows.view(integer),
        slots,
        len(slots),
        blocks.stride(1),
        INTO_BLOCKS=into_blocks,
        WIDTH=width,
        BLOCK_WIDTH=power_of_two(width),
        TOKENS=TOKENS_PER_PROGRAM,
    )


@jit_sizes("num_rows", tables=("slots_ptr",))
def _copy_rows_kernel(
    blocks_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    num_rows: tl.tensor,
    side_stride: tl.tensor,
    INTO_BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """A side is the K or the V of one layer; ``side_stride`` apart in the blocks."""
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    side = tl.program_id(1).to(tl.int64)
    in_rows = rows < num_rows
    slots = tl.load(slots_ptr + rows, mask=in_rows, other=-1).to(tl.int64)
    columns = tl.arange(0, BLOCK_WIDTH)[None, :]
    used = (slots >= 0)[:, None] & (columns < WIDTH)
    in_blocks = blocks_ptr + side * side_stride + slots[:, None] * WIDTH + columns
    in_buffer = rows_ptr + (side * num_rows + rows)[:, None] * WIDTH + columns
    if INTO_BLOCKS:
        tl.store(in_blocks, tl.load(in_buffer, mask=used), mask=used)
    else:
        found = tl.load(in_blocks, mask=used, other=0)
        tl.store(in_buffer, found, mask=in_rows[:, None] & (columns < WIDTH))
