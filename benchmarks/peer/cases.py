"""What is asked of both, the bars, and what was predicted before the first run."""

from __future__ import annotations

from random import Random

import msgspec

from benchmarks.engine.cases import random_prompt

OUTPUT_TOKENS = 32
REQUESTS = {1: 4, 8: 24, 32: 48}
"""Of one window, by the number of clients: several for each, so that the time in which they start
and end does not decide."""


class Case(msgspec.Struct, frozen=True):
    """``concurrency`` clients, each of which sends its next request when the last one is answered.

    Answers have exactly OUTPUT_TOKENS tokens.
    """

    prompt_tokens: int
    concurrency: int

    @property
    def name(self) -> str:
        return f"{self.prompt_tokens}/{OUTPUT_TOKENS} x{self.concurrency}"

    @property
    def has_control(self) -> bool:
        """Two colocated replicas serve it too; a lone client would keep one of them idle."""
        return self.concurrency > 1


CASES = tuple(Case(prompt, clients) for prompt in (128, 512) for clients in REQUESTS)

FIGURES = ("ttft", "tpot", "e2e", "rps")
"""Each as a ratio that is above 1 where ours is better."""
BAR = 1.0
"""For every figure of every case, 1P+1D beside 1P+1D, whichever way the peer was started."""
RPS_BARS = {("eager", 8): 1.5, ("compiled", 8): 1.0}
"""By the peer's start and the number of clients: what requests/s must reach instead."""
PUBLISHED_TRANSFER_MS = (2.7, 4.2)
"""What vLLM's own log said of 8 MB over NIXL on cores with AVX-512; the same run says what it takes
on these."""

PREDICTED_RPS: dict[tuple[str, str], float] = {
    ("eager", "128/32 x1"): 2.5,
    ("eager", "128/32 x8"): 2.2,
    ("eager", "128/32 x32"): 1.7,
    ("eager", "512/32 x1"): 1.8,
    ("eager", "512/32 x8"): 1.4,
    ("eager", "512/32 x32"): 1.2,
    ("compiled", "128/32 x1"): 1.8,
    ("compiled", "128/32 x8"): 1.6,
    ("compiled", "128/32 x32"): 1.3,
    ("compiled", "512/32 x1"): 1.5,
    ("compiled", "512/32 x8"): 1.2,
    ("compiled", "512/32 x32"): 1.1,
}
"""Requests/s, ours by the peer's, by its start and the case: written down before anything of this
was run, from the engines alone (prefill 1.16, decode x1 2.3, x8 1.8, x32 1.3 times as fast), and
from the belief that long prompts leave everything to the prefill worker's one core."""


def prompts(case: Case, count: int, seed: int, repeat: int) -> list[list[int]]:
    """New ones in every repeat, alike for every system."""
    random = Random(f"{seed} {case.name} {repeat}")
    return [random_prompt(random, case.prompt_tokens) for _ in range(count)]


def num_requests(case: Case, *, quick: bool) -> int:
    return max(2, case.concurrency) if quick else REQUESTS[case.concurrency]
