"""The KV blocks of one worker as one tensor; which block is whose is the block pool's business.

Shape ``[layers, 2 (K, V), num_blocks, block_size, kv_heads, head_dim]``. A slot is one
token's place: ``block * block_size + offset``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from baton.engine.kernels.registry import kernels_for
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
        """Raises ConfigError for a GPU whose kernels cannot be compiled here."""
        self._kernels = kernels_for(device) if device.type == "cuda" else None
        """What moves tokens; torch's own indexing on a CPU."""
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
        out: memoryview | None = None,
    ) -> memoryview:
        """Bytes of positions ``start .. start + num_tokens - 1``: a contiguous copy.

        Shape ``[num_layers, 2, num_tokens, kv_heads, head_dim]``, as ``KvLayout`` says. In
        ``out`` where given (writable, aligned to the dtype, of exactly that size), else in
        memory of its own.
        """
        slots = torch.from_numpy(self._slots(block_table, start, num_tokens))
        rows = self._rows[self._layers(layer_start, num_layers)]
        if self._kernels is not None:
            slots = slots.to(rows.device)
            found = self._kernels.gather_blocks(self.blocks, slots, layer_start, num_layers)
            return _copied_to_host(found, out)
        if out is None:
            return _bytes_of(rows.index_select(2, slots))
        target = torch.frombuffer(out, dtype=rows.dtype).view(*rows.shape[:2], num_tokens, -1)
        torch.index_select(rows, 2, slots, out=target)
        return out

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
        shape = (num_layers, 2, num_tokens, self._rows.shape[-1] * self._rows.element_size())
        num_bytes = int(np.prod(shape))
        given = memoryview(payload).nbytes
        if given != num_bytes:
            raise InternalError(
                f"KV payload has {given} bytes; {num_bytes} expected for {num_tokens} tokens of "
                f"{num_layers} layers of {self.layout}"
            )
        came = np.frombuffer(payload, dtype=np.uint8)
        if self._kernels is None:
            rows = self._rows.view(torch.uint8).numpy()[layers]
            came = came.reshape(shape)
            for token, slot, count in _runs(slots):
                rows[:, :, slot : slot + count] = came[:, :, token : token + count]
            return
        staging = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._rows.is_cuda)
        staging.numpy()[:] = came
        # Page-locked memory is not given to others before the copy out of it is done.
        staged = staging.view(self._rows.dtype).to(self._rows.device, non_blocking=True)
        staged = staged.view(num_layers, 2, num_tokens, *self.blocks.shape[-2:])
        on_device = torch.from_numpy(slots).to(self._rows.device)
        self._kernels.scatter_blocks(self.blocks, on_device, layer_start, staged)

    def _layers(self, layer_start: int, num_layers: int) -> slice:
        total = self.layout.num_layers
        if layer_start < 0 or num_layers < 1 or layer_start + num_layers > total:
            raise InternalError(
                f"{num_layers} layers from {layer_start} asked; the model has {total} layers"
            )
        return slice(layer_start, layer_start + num_layers)

    def _slots(self, block_table: Sequence[int], start: int, num_tokens: int) -> np.ndarray:
        slots = slots_of(
            np.asarray(block_table, dtype=np.int64), start, num_tokens, self.block_size
        )
        if slots.size and not (
            slots.min() >= 0 and slots.max() < self.num_blocks * self.block_size
        ):
            raise InternalError(f"block table {tuple(block_table)}: ids 0 to {self.num_blocks - 1}")
        return slots


def _runs(slots: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(first token, its slot, how many) of tokens whose slots are neighbours: blocks, mostly."""
    if not len(slots):
        return
    starts = [0, *(np.flatnonzero(np.diff(slots) != 1) + 1).tolist()]
    for start, end in pairwise([*starts, len(slots)]):
        yield start, int(slots[start]), end - start


def _copied_to_host(rows: Tensor, out: memoryview | None) -> memoryview:
    """In one copy, in page-locked memory unless ``out`` is given; it is done on return."""
    if out is not None:
        torch.frombuffer(out, dtype=rows.dtype).view(rows.shape).copy_(rows)
        return out
    host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda)
    host.copy_(rows)
    return _bytes_of(host)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


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
