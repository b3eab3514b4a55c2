"""Before any number: our greedy tokens are those of transformers, in float32."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any, Protocol

import msgspec

from benchmarks.engine.cases import random_prompt

NEAR_TIE = 1e-3
"""Logits (of a spread of about 4) closer than this are a tie that another order of sums flips."""
PROMPT_TOKENS = (5, 33, 128, 300)
OUTPUT_TOKENS = 48
TIMEOUT_S = 300.0


class Answering(Protocol):
    name: str

    async def ask(self, question: Mapping[str, Any], timeout_s: float) -> dict[str, Any]: ...


class GateResult(msgspec.Struct, frozen=True):
    engine: str
    num_prompts: int
    num_tokens: int
    num_near_ties: int


class GateRed(Exception):
    """The engine wrote something else: its speed means nothing."""


async def check(engine: Answering, reference: Answering, seed: int) -> GateResult:
    """Every token must be what the reference likes best after the tokens before it."""
    random = Random(f"{seed} gate")
    prompts = [random_prompt(random, num_tokens) for num_tokens in PROMPT_TOKENS]
    asked = {"op": "greedy", "prompts": prompts, "num_tokens": OUTPUT_TOKENS}
    tokens = (await engine.ask(asked, TIMEOUT_S))["tokens"]
    lengths = [len(t) for t in tokens]
    if lengths != [OUTPUT_TOKENS] * len(prompts):
        raise GateRed(f"{engine.name} wrote {lengths} tokens; {OUTPUT_TOKENS} each were asked")
    about = {"op": "gaps", "prompts": prompts, "tokens": tokens}
    gaps = (await reference.ask(about, TIMEOUT_S))["gaps"]
    for number, of_prompt in enumerate(gaps):
        # Not "at least": a gap that is no number must not pass.
        bad = [i for i, gap in enumerate(of_prompt) if not gap < NEAR_TIE]
        if bad:
            raise GateRed(
                f"{engine.name}: token {bad[0]} after prompt {number} ({PROMPT_TOKENS[number]} "
                f"tokens) is {tokens[number][bad[0]]}; {reference.name} has one whose logit is "
                f"{of_prompt[bad[0]]:.4f} higher"
            )
    return GateResult(
        engine=engine.name,
        num_prompts=len(prompts),
        num_tokens=sum(lengths),
        num_near_ties=sum(gap > 0 for of_prompt in gaps for gap in of_prompt),
    )
