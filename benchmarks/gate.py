"""The correctness gate: deployments that write different tokens have no speed to compare."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

import baton
from baton.client import Choice, TokenLogprobs
from baton.protocol.errors import BatonError
from benchmarks.workload import Gate


class GateFailed(BatonError):
    code = "gate_failed"


class GateResult(msgspec.Struct, frozen=True):
    """``num_near_ties``: prompts whose answers part where two tokens were as good."""

    compared: tuple[str, str]
    num_prompts: int
    num_tokens: int
    num_near_ties: int


async def greedy_answers(
    client: baton.AsyncClient, prompts: Sequence[tuple[int, ...]], gate: Gate, timeout_s: float
) -> list[Choice]:
    """All prompts at once, so that batching is part of what is checked."""
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(
                client.generate(
                    prompt,
                    max_tokens=gate.output_tokens,
                    temperature=0.0,
                    ignore_eos=True,
                    logprobs=2,
                    timeout=timeout_s,
                )
            )
            for prompt in prompts
        ]
    return [task.result().choices[0] for task in tasks]


def compare(
    names: tuple[str, str], one: Sequence[Choice], other: Sequence[Choice], gate: Gate
) -> GateResult:
    """Raises GateFailed that names the first prompt and token that differ beyond a near tie."""
    num_near_ties = 0
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        differs_at = _first_difference(a, b)
        if differs_at is None:
            continue
        if differs_at < min(len(a.tokens), len(b.tokens)):
            here, there = a.tokens[differs_at], b.tokens[differs_at]
            if _is_near_tie(here.logprobs, there.token_id, gate.near_tie_logprob):
                num_near_ties += 1
                continue
        raise GateFailed(
            f"the gate is red, nothing was measured: prompt {number} of {len(one)}, output token "
            f"{differs_at}: {names[0]} has {_token(a, differs_at)}, {names[1]} has "
            f"{_token(b, differs_at)}, and it is no near tie (two best within "
            f"{gate.near_tie_logprob:g}); the same greedy request must give the same tokens"
        )
    return GateResult(names, len(one), sum(len(a.tokens) for a in one), num_near_ties)


def _first_difference(a: Choice, b: Choice) -> int | None:
    ids, others = [t.token_id for t in a.tokens], [t.token_id for t in b.tokens]
    if ids == others:
        return None
    pairs = zip(ids, others, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(ids), len(others)))


def _is_near_tie(logprobs: TokenLogprobs | None, rival_id: int, within: float) -> bool:
    """The rival was as good as the chosen one, in the eyes of who chose."""
    if logprobs is None:
        return False
    rival = next((top for top in logprobs.top if top.token_id == rival_id), None)
    return rival is not None and abs(logprobs.logprob - rival.logprob) <= within


def _token(choice: Choice, index: int) -> str:
    return str(choice.tokens[index].token_id) if index < len(choice.tokens) else "no token"
