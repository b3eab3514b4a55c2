"""Host memory for the KV blocks of preempted sequences, and the copies there and back.

Which block goes where was decided by the scheduler (``host_swap``). Shape as the cache's:
``[layers, 2, num_host_blocks, block_size, kv_heads, head_dim]``; page-locked beside a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from baton.engine.kv_cache import KvCache
from baton.engine.plan import BlockSwap
from baton.engine.preemption import EngineRates
from baton.protocol.errors import ConfigError

STAGED_BLOCKS = 64
"""Copied at once: bounds the memory that a copy needs beside the two pools."""


class SwapSpace:
    def __init__(self, cache: KvCache, num_host_blocks: int) -> None:
        """Raises ConfigError when the host has not so much memory."""
        self._device = cache.blocks
        layers, pair, _, *row = cache.blocks.shape
        shape = (layers, pair, num_host_blocks, *row)
        is_gpu = cache.blocks.device.type == "cuda"
        try:
            self._host = torch.empty(shape, dtype=cache.blocks.dtype, pin_memory=is_gpu)
        except RuntimeError as exc:
            size = num_host_blocks * cache.layout.bytes_per_token * cache.block_size
            raise ConfigError(
                f"swap_blocks is {num_host_blocks}, {size:,} bytes of host memory, which cannot "
                "be had; allow fewer, or 0 to recompute preempted requests",
                param="engine.swap_blocks",
            ) from exc

    def copy(
        self, swap_out: Sequence[BlockSwap], swap_in: Sequence[BlockSwap]
    ) -> tuple[float, float]:
        """All out, then all in; the seconds that each took. The device has done both."""
        began = time.perf_counter()
        for swaps in _batches(swap_out):
            blocks, host_blocks = _indexes(swaps)
            rows = self._device.index_select(2, blocks.to(self._device.device))
            self._host.index_copy_(2, host_blocks, rows.cpu())
        half = time.perf_counter()
        for swaps in _batches(swap_in):
            blocks, host_blocks = _indexes(swaps)
            rows = self._host.index_select(2, host_blocks).to(self._device.device)
            self._device.index_copy_(2, blocks.to(self._device.device), rows)
        if swap_in and self._device.is_cuda:
            torch.cuda.synchronize(self._device.device)
        return half - began, time.perf_counter() - half

    def measure(self) -> EngineRates:
        """Copy some blocks out and back, while nobody uses them; only the swap rates are set."""
        count = min(STAGED_BLOCKS, self._host.shape[2], self._device.shape[2])
        swaps = tuple(BlockSwap(n, n) for n in range(count))
        num_bytes = self._host[:, :, :count].nbytes
        self.copy(swaps, swaps)
        out_seconds, in_seconds = self.copy(swaps, swaps)
        return EngineRates(0.0, num_bytes / out_seconds, num_bytes / in_seconds)


def _batches(swaps: Sequence[BlockSwap]) -> list[Sequence[BlockSwap]]:
    return [swaps[n : n + STAGED_BLOCKS] for n in range(0, len(swaps), STAGED_BLOCKS)]


def _indexes(swaps: Sequence[BlockSwap]) -> tuple[Tensor, Tensor]:
    blocks = torch.tensor([s.block for s in swaps], dtype=torch.int64)
    return blocks, torch.tensor([s.host_block for s in swaps], dtype=torch.int64)
