"""Blocks that went to the host and came back elsewhere are the same bytes."""

from __future__ import annotations

import pytest
import torch

from baton.engine.kv_cache import KvCache
from baton.engine.plan import BlockSwap
from baton.engine.swap_space import STAGED_BLOCKS, SwapSpace
from baton.protocol.layout import KvLayout


def cache_of(num_blocks: int, dtype: torch.dtype, device: str = "cpu") -> KvCache:
    name = str(dtype).removeprefix("torch.")
    layout = KvLayout.uniform(
        num_layers=3, num_kv_heads=2, head_dim=4, dtype=name, model_digest="m"
    )
    cache = KvCache(
        layout, num_blocks=num_blocks, block_size=8, dtype=dtype, device=torch.device(device)
    )
    generator = torch.Generator().manual_seed(3)
    noise = torch.randint(0, 256, (cache.blocks.nbytes,), dtype=torch.uint8, generator=generator)
    # Any bits at all, NaNs of every kind among them.
    cache.blocks.copy_(noise.view(dtype).view(cache.blocks.shape))
    return cache


def bits(cache: KvCache, block: int) -> bytes:
    return cache.blocks[:, :, block].cpu().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_survive_the_way_out_and_back(dtype: torch.dtype, device: str) -> None:
    num_blocks = 2 * STAGED_BLOCKS + 5
    cache = cache_of(num_blocks, dtype, device)
    space = SwapSpace(cache, num_blocks)
    moved = range(3, STAGED_BLOCKS + 7)
    before = [bits(cache, block) for block in range(num_blocks)]
    out = tuple(BlockSwap(block, num_blocks - 1 - block) for block in moved)
    space.copy(out, ())
    for block in moved:
        cache.blocks[:, :, block] = float("nan")
    back = tuple(BlockSwap((s.block + 11) % num_blocks, s.host_block) for s in out)
    space.copy((), back)
    targets = {s.block: source.block for s, source in zip(back, out, strict=True)}
    for block in range(num_blocks):
        if block in targets:
            assert bits(cache, block) == before[targets[block]]
        elif block not in moved:
            assert bits(cache, block) == before[block]


def test_out_comes_before_in() -> None:
    """One plan may give a block to another sequence and bring that one's KV into it."""
    cache = cache_of(4, torch.float32)
    space = SwapSpace(cache, 4)
    first, second = bits(cache, 0), bits(cache, 1)
    space.copy((BlockSwap(1, 2),), ())
    space.copy((BlockSwap(0, 3),), (BlockSwap(0, 2),))
    assert bits(cache, 0) == second
    space.copy((), (BlockSwap(1, 3),))
    assert bits(cache, 1) == first


def test_measuring_changes_nothing() -> None:
    cache = cache_of(6, torch.float32)
    before = [bits(cache, block) for block in range(6)]
    rates = SwapSpace(cache, 4).measure()
    assert [bits(cache, block) for block in range(6)] == before
    assert rates.swap_out_bytes_per_second > 0
    assert rates.swap_in_bytes_per_second > 0
    assert rates.prefill_seconds_per_token == 0
