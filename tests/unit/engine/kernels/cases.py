"""Inputs for every operation, the same for the interpreter's small shapes and a GPU's real ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baton.engine.kernels.registry import REFERENCES, TRITON
from baton.protocol.sampling import SamplingParams

UNREADABLE_BLOCK = 2**30
"""Stands behind a sequence's last block: reading that block ends the process."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Absolute and relative, of every operation that computes; copies must be equal."""


@dataclass(frozen=True)
class Paged:
    """One layer's cache in which only the slots in use hold numbers; all others hold NaN."""

    key_blocks: Tensor
    value_blocks: Tensor
    block_tables: Tensor
    context_lens: Tensor


def paged(
    context_lens: list[int],
    *,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    device: str,
    block_size: int = 4,
    spare_columns: int = 2,
) -> Paged:
    """Tables of blocks in random order."""
    counts = [-(-n // block_size) for n in context_lens]
    order = torch.randperm(sum(counts) + 1).tolist()
    shape = (sum(counts) + 1, block_size, kv_heads, dim)
    caches = torch.full((2, *shape), float("nan"), dtype=dtype)
    tables = torch.full((len(counts), max(counts) + spare_columns), UNREADABLE_BLOCK)
    for row, (length, count) in enumerate(zip(context_lens, counts, strict=True)):
        ids = [order.pop() for _ in range(count)]
        tables[row, :count] = torch.tensor(ids, dtype=torch.int64)
        positions = torch.arange(length)
        blocks = tables[row, positions // block_size]
        fresh = torch.randn(2, length, kv_heads, dim).to(dtype)
        caches[:, blocks, positions % block_size] = fresh
    return Paged(
        caches[0].to(device),
        caches[1].to(device),
        tables.int().to(device),
        torch.tensor(context_lens, dtype=torch.int32, device=device),
    )


def forget_unseen(kv: Paged, num_rows: list[int], window: int | None) -> Paged:
    """NaN, too, in the slots before the first that any of a sequence's last ``num_rows`` tokens
    sees: of a prompt that came from elsewhere they hold anything."""
    block_size = kv.key_blocks.shape[1]
    for row, count in enumerate(num_rows):
        first = 0 if window is None else int(kv.context_lens[row]) - count - window + 1
        positions = torch.arange(max(0, first), device=kv.block_tables.device)
        blocks = kv.block_tables[row].long()[positions // block_size]
        kv.key_blocks[blocks, positions % block_size] = float("nan")
        kv.value_blocks[blocks, positions % block_size] = float("nan")
    return kv


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors hold NaN: an output that nothing wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def both(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """(of the reference, of the kernel)"""
    expected = getattr(REFERENCES, name)(*args, **kwargs)
    with poisoned_memory():
        found = getattr(TRITON, name)(*args, **kwargs)
    return expected, found


def assert_close(expected: Tensor, found: Tensor) -> None:
    assert found.dtype == expected.dtype
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def check(name: str, *args: Any, **kwargs: Any) -> Tensor:
    expected, found = both(name, *args, **kwargs)
    assert_close(expected, found)
    result: Tensor = found
    return result


def randn(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape).to(dtype).to(device)


def sampling_inputs(num_rows: int, vocab_size: int, device: str) -> list[Tensor]:
    """Logits with many equal values, some -inf, and every filter on and off."""
    logits = (torch.randn(num_rows, vocab_size) * 12).round() / 4
    logits[:, ::7] = float("-inf")
    temperature = torch.rand(num_rows) + 0.3
    temperature[::5] = 0
    top_k = torch.randint(1, 60, (num_rows,), dtype=torch.int32)
    top_k[::3] = 0
    top_k[1] = vocab_size + 5
    top_p = torch.rand(num_rows) * 0.9 + 0.1
    top_p[::4] = 1
    min_p = torch.rand(num_rows) * 0.2
    min_p[::2] = 0
    uniforms = torch.rand(num_rows, dtype=torch.float64)
    uniforms[-1] = 1 - 2**-53
    return [x.to(device) for x in (logits, temperature, top_k, top_p, min_p, uniforms)]


def requests(num_rows: int, vocab_size: int) -> list[SamplingParams]:
    """Every combination of filters, greedy rows between them."""
    rng = np.random.default_rng(4)
    temperatures, top_ks = (0.0, 0.3, 1.0, 1.7), (0, 1, 40, vocab_size, 2**40)
    return [
        SamplingParams(
            temperature=temperatures[n % 4],
            top_k=top_ks[n % 5],
            top_p=(1.0, 0.9, 0.31)[n % 3],
            min_p=(0.0, 0.05)[n // 4 % 2],
            seed=int(rng.integers(0, 2**63)),
        )
        for n in range(num_rows)
    ]
