"""What is measured, and the bars that a result is held against."""

from __future__ import annotations

from random import Random
from typing import Literal

import msgspec

from benchmarks.engine.checkpoint import VOCAB_SIZE

FIRST_PLAIN_ID = 2
"""The ids below begin and end texts; some engines treat them in ways of their own."""


class Case(msgspec.Struct, frozen=True):
    """prefill: one prompt at a time, to its first token. decode: ``steps`` steps of ``batch``
    sequences that are all past their prompts."""

    name: str
    op: Literal["prefill", "decode"]
    prompt_tokens: int
    batch: int = 1
    steps: int = 0


CASES = (
    Case("prefill 512", "prefill", 512),
    Case("prefill 2048", "prefill", 2_048),
    Case("decode x1", "decode", 128, batch=1, steps=64),
    Case("decode x8", "decode", 128, batch=8, steps=64),
    Case("decode x32", "decode", 128, batch=32, steps=64),
)

BARS: dict[tuple[str, str], float] = {
    ("vllm", "prefill 512"): 0.9,
    ("vllm", "prefill 2048"): 0.9,
    ("vllm", "decode x1"): 1.5,
    ("vllm", "decode x8"): 1.2,
    ("vllm", "decode x32"): 1.0,
}
"""By peer and case: what our tokens/s divided by the peer's must reach."""
MEMORY_BAR = 1.3
"""Resident bytes divided by those of weights and KV pool must stay below."""


def random_prompt(random: Random, num_tokens: int) -> list[int]:
    return [random.randrange(FIRST_PLAIN_ID, VOCAB_SIZE) for _ in range(num_tokens)]


def batches(case: Case, count: int, seed: int, repeat: int) -> list[list[list[int]]]:
    """``count`` batches of prompts, each prompt new; every engine gets the same ones."""
    random = Random(f"{seed} {case.name} {repeat}")
    return [
        [random_prompt(random, case.prompt_tokens) for _ in range(case.batch)] for _ in range(count)
    ]
