"""The KV blocks of one worker as one tensor; which block is whose is the block pool's business.

Shape ``[layers, 2 (K, V), num_blocks, block_size, kv_heads, head_dim]``. A slot is one
token's place: ``block * block_size + offset``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from baton.protocol.errors import InternalError
from baton.protocol.layout import KvLayout

Bytes = bytes | bytearray | memoryview


class KvCache:
    def __init__(
        self,
        layout: KvLayout,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.blocks = torch.zeros(
            (
                layout.num_layers,
                2,
                num_blocks,
                block_size,
                layout.num_kv_heads,
                layout.head_dim,
            ),
            dtype=dtype,
            device=device,
        )
        # One row per slot: a gather of tokens copies whole rows.
        self._rows = self.blocks.view(
            layout.num_layers,
            2,
            num_blocks * block_size,
            layout.num_kv_heads * layout.head_dim,
        )
        self._layer_blocks = [(layer[0], layer[1]) for layer in self.blocks]

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V, each ``[num_blocks, block_size, kv_heads, head_dim]``."""
        return self._layer_blocks[layer]

    def read(
        self,
        block_table: Sequence[int],
        start: int,
        num_tokens: int,
        layer_start: int,
        num_layers: int,
    ) -> memoryview:
        """Bytes of positions ``start .. start + num_tokens - 1``: an own contiguous copy.

        Shape ``[num_layers, 2, num_tokens, kv_heads, head_dim]``, as ``KvLayout`` says.
        """
        slots = self._slots(block_table, start, num_tokens)
        layers = self._layers(layer_start, num_layers)
        copy = self._rows[layers].index_select(2, slots).cpu()
        return copy.reshape(-1).view(torch.uint8).numpy().data

    def write(
        self,
        block_table: Sequence[int],
        start: int,
        num_tokens: int,
        layer_start: int,
        num_layers: int,
        payload: Bytes,
    ) -> None:
        """The reverse of ``read``. Raises InternalError when the length does not fit."""
        slots = self._slots(block_table, start, num_tokens)
        layers = self._layers(layer_start, num_layers)
        shape = (num_layers, 2, num_tokens, self._rows.shape[-1])
        num_bytes = int(np.prod(shape)) * self._rows.element_size()
        given = memoryview(payload).nbytes
        if given != num_bytes:
            raise InternalError(
                f"KV payload has {given} bytes; {num_bytes} expected for {num_tokens} tokens of "
                f"{num_layers} layers of {self.layout}"
            )
        # The copy makes read-only and unaligned buffers safe to view as the cache's dtype.
        staging = torch.empty(num_bytes, dtype=torch.uint8)
        staging.numpy()[:] = np.frombuffer(payload, dtype=np.uint8)
        rows = staging.view(self._rows.dtype).view(shape).to(self._rows.device)
        self._rows[layers].index_copy_(2, slots, rows)

    def _layers(self, layer_start: int, num_layers: int) -> slice:
        total = self.layout.num_layers
        if layer_start < 0 or num_layers < 1 or layer_start + num_layers > total:
            raise InternalError(
                f"{num_layers} layers from {layer_start} asked; the model has {total} layers"
            )
        return slice(layer_start, layer_start + num_layers)

    def _slots(self, block_table: Sequence[int], start: int, num_tokens: int) -> Tensor:
        slots = slots_of(
            np.asarray(block_table, dtype=np.int64), start, num_tokens, self.block_size
        )
        if slots.size and not (
            slots.min() >= 0 and slots.max() < self.num_blocks * self.block_size
        ):
            raise InternalError(f"block table {tuple(block_table)}: ids 0 to {self.num_blocks - 1}")
        return torch.from_numpy(slots).to(self._rows.device)


def slots_of(block_table: np.ndarray, start: int, num_tokens: int, block_size: int) -> np.ndarray:
    """Slots (int64) of positions ``start .. start + num_tokens - 1`` of one sequence.

    Raises InternalError when the table does not cover them.
    """
    end = start + num_tokens
    if start < 0 or num_tokens < 0 or end > len(block_table) * block_size:
        raise InternalError(
            f"positions {start} to {end - 1} asked of {len(block_table)} blocks of {block_size}"
        )
    positions = np.arange(start, end, dtype=np.int64)
    return block_table[positions // block_size] * block_size + positions % block_size
