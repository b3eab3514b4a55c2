"""Our engine as an engine process: the scheduler and the executor that a worker runs, no router."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import count
from pathlib import Path

import torch

from baton.engine.block_pool import BlockPool
from baton.engine.executor import Executor
from baton.engine.models.backends import backend_for
from baton.engine.plan import StepPlan
from baton.engine.scheduler import NewToken, Scheduler
from baton.engine.scheduler import Sequence as Running
from baton.protocol.config import EngineConfig
from baton.protocol.sampling import SamplingParams
from benchmarks.engine.answer import Engine, Setup, answer

BLOCK_SIZE = 16
FILL_TOKENS = 256


class Baton(Engine):
    def __init__(self, setup: Setup) -> None:
        num_blocks = math.ceil(setup.pool_tokens / BLOCK_SIZE)
        self._executor = Executor.load(
            Path(setup.checkpoint),
            dtype=setup.dtype,
            device="cpu",
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            num_threads=setup.num_threads,
        )
        config = EngineConfig(
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            max_num_seqs=setup.max_num_seqs,
            max_num_batched_tokens=setup.max_num_batched_tokens,
            num_threads=setup.num_threads,
            prefix_cache=False,
        )
        self._scheduler = Scheduler(BlockPool(num_blocks, BLOCK_SIZE), config, frozenset())
        self._ids = count()
        cpu = torch.device("cpu")
        backend = backend_for(cpu, num_threads=setup.num_threads, deterministic=False)
        # Says whether this machine could compile the kernels.
        self.versions = {"torch": version("torch"), "arithmetic": backend.arithmetic}
        self.pool_bytes = num_blocks * BLOCK_SIZE * self._executor.layout.bytes_per_token

    def prefill(self, prompt: Sequence[int]) -> None:
        self._add(prompt, 1)
        while self._step():
            pass

    def decode(self, prompts: Sequence[Sequence[int]], warm_steps: int, steps: int) -> float:
        # Prompts computed in different steps are not equally far: none may end before the clock.
        names = [self._add(p, 1 + warm_steps + 2 * steps + len(prompts)) for p in prompts]
        lengths = dict.fromkeys(names, 0)
        began: float | None = None
        first = 0
        while True:
            for token in self._step():
                lengths[token.sequence.seq_id] += 1
            made = sum(lengths.values())
            if began is None and min(lengths.values()) > warm_steps:
                began, first = time.perf_counter(), made
            elif began is not None and made - first >= steps * len(prompts):
                seconds = time.perf_counter() - began
                break
        for name in names:
            self._scheduler.drop(name)
        return seconds * steps * len(prompts) / (made - first)

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        self._add(prompt, num_tokens)
        found: list[int] = []
        while news := self._step():
            found += [token.token_id for token in news]
        return found

    def fill_pool(self) -> bool:
        """Zeros through the same door that a transferred KV cache comes in by."""
        layout = self._executor.layout
        num_blocks = self._scheduler.pool.num_blocks
        blocks_at_once = FILL_TOKENS // BLOCK_SIZE
        for first in range(0, num_blocks, blocks_at_once):
            table = tuple(range(first, min(num_blocks, first + blocks_at_once)))
            num_tokens = len(table) * BLOCK_SIZE
            payload = bytes(num_tokens * layout.bytes_per_token)
            self._executor.write_kv(table, 0, num_tokens, 0, layout.num_layers, payload)
        return True

    def _add(self, prompt: Sequence[int], num_tokens: int) -> str:
        name = f"r{next(self._ids)}"
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        self._scheduler.add(Running(name, tuple(prompt), [], sampling))
        return name

    def _step(self) -> list[NewToken]:
        """Steps until one draws a token; empty when nothing is left to run."""
        while True:
            plan: StepPlan | None = self._scheduler.schedule()
            if plan is None:
                return []
            news = self._scheduler.complete(self._executor.execute(plan))
            if news:
                return news


if __name__ == "__main__":
    answer(Baton)
