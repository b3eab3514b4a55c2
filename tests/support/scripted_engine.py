"""An engine process for tests of the benchmark: no model, answers by rule.

Mode, given when it is opened: ``right`` answers; ``wrong`` has one greedy token that is not the
best; ``refuse`` cannot be opened; ``hang`` and ``die`` do so in prefill; ``parent`` starts a child.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.engine.answer import Engine, Setup, answer

WRONG_TOKEN = 7


class Scripted(Engine):
    versions = {"scripted": "1"}  # noqa: RUF012 - never changed
    pool_bytes = 1_024

    def __init__(self, setup: Setup) -> None:
        print("a banner that is no answer")
        if setup.mode == "refuse":
            raise ValueError("no such dtype")
        self._mode = setup.mode
        self._pool_filled = False
        if setup.mode == "parent":
            subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])

    def prefill(self, prompt: Sequence[int]) -> None:
        if self._mode == "hang":
            signal.pause()
        if self._mode == "die":
            os._exit(3)

    def decode(self, prompts: Sequence[Sequence[int]], warm_steps: int, steps: int) -> float:
        return 0.001 * steps * len(prompts)

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        tokens = [(sum(prompt) + i) % 5 for i in range(num_tokens)]
        if self._mode == "wrong":
            tokens[1] = WRONG_TOKEN
        return tokens

    def gaps(self, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
        return [2.5 if token == WRONG_TOKEN else 0.0 for token in tokens]

    def fill_pool(self) -> bool:
        self._pool_filled = True
        return True


if __name__ == "__main__":
    answer(Scripted)
