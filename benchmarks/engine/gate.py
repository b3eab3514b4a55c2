"""Before any number: an engine's greedy tokens are those of transformers in float32.

In bfloat16 they are nearly as good: what float32 likes best after the same tokens leads by little.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any, Protocol

import msgspec

from benchmarks.engine.cases import random_prompt

TOLERANCES = {"float32": 1e-3, "bfloat16": 0.5}
"""By how much the reference's best logit may lead the engine's choice, where logits spread with a
deviation of 4: in float32 a tie that another order of sums flips. A wrong token is off by 10."""
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
    tolerance: float
    most_off: float


class GateRed(Exception):
    """The engine wrote something else: its speed means nothing."""


async def check(engine: Answering, reference: Answering, seed: int, tolerance: float) -> GateResult:
    """Every token must be what the reference likes best after the tokens before it, or as good
    within ``tolerance``; those are counted. Raises GateRed."""
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
        bad = [i for i, gap in enumerate(of_prompt) if not gap < tolerance]
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
        tolerance=tolerance,
        most_off=max(map(max, gaps)),
    )
