"""KV of a real text, computed by the engine: in chunks, from any token on."""

from __future__ import annotations

import time
from pathlib import Path

from baton.engine.executor import Executor
from baton.engine.plan import SequenceChunk, StepPlan
from baton.protocol.sampling import SamplingParams

BLOCK_TOKENS = 16
CHUNK_TOKENS = 512
NUM_BLOCKS = 4_096 // BLOCK_TOKENS
ALL_BLOCKS = tuple(range(NUM_BLOCKS))


def load(folder: Path) -> Executor:
    """One core, bfloat16, room for one prompt."""
    return Executor.load(
        folder,
        dtype="bfloat16",
        device="cpu",
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_TOKENS,
        num_threads=1,
    )


def compute(
    executor: Executor, token_ids: tuple[int, ...], start: int, blocks: tuple[int, ...] = ALL_BLOCKS
) -> list[tuple[int, int, float]]:
    """KV of ``token_ids[start:]`` into ``blocks``, which hold that of those before: (first token,
    stop, seconds) of each chunk."""
    chunks = []
    for first in range(start, len(token_ids), CHUNK_TOKENS):
        stop = min(first + CHUNK_TOKENS, len(token_ids))
        table = blocks[: -(-stop // BLOCK_TOKENS)]
        sampling = SamplingParams()
        chunk = SequenceChunk("x", token_ids[first:stop], first, table, False, sampling)
        began = time.perf_counter()
        executor.execute(StepPlan(first, (chunk,)))
        chunks.append((first, stop, time.perf_counter() - began))
    return chunks
