"""Tokens between the paged cache and one contiguous buffer: the bytes that go over the wire.

blocks: ``[L, 2 (K, V), N, BS, K, D]``, contiguous. slots: ``[T]`` int64, ``block * BS + offset``.
``gather_blocks`` returns ``[num_layers, 2, T, K, D]`` of layers ``layer_start ..``; slot -1 gives
a row of zeros. ``scatter_blocks`` stores such a tensor (rows, contiguous, of the cache's dtype);
slot -1 is skipped, and no two rows may name the same slot. Bytes are moved as they are.
"""

from __future__ import annotations

from torch import Tensor


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
