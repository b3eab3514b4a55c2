"""Store new K and V rows into the slots of one layer's paged cache.

k, v: ``[T, K, D]``; the last dimension is contiguous, rows may be strided (views of one fused
product). key_blocks, value_blocks: ``[N, BS, K, D]``, contiguous, of the dtype of k and v.
slots: ``[T]`` int64, ``block * BS + offset``. Slot -1: the row is padding and is skipped.
No two rows may name the same slot.
"""

from __future__ import annotations

from torch import Tensor


def store_kv_reference(
    k: Tensor, v: Tensor, key_blocks: Tensor, value_blocks: Tensor, slots: Tensor
) -> None:
    used = slots >= 0
    places = slots[used]
    key_blocks.flatten(0, 1)[places] = k[used]
    value_blocks.flatten(0, 1)[places] = v[used]
