"""Before any number: every system writes the tokens that ours writes.

Where our two best tokens are within a hair another order of sums may take the other one; what
follows there is not compared. That ours are transformers' is what ``bench-engine`` checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import msgspec

import baton
from baton.client import Choice
from benchmarks import workload
from benchmarks.engine.cases import random_prompt
from benchmarks.gate import greedy_answers
from benchmarks.peer.ask import REQUEST_TIMEOUT_S, ask, body
from benchmarks.peer.cases import OUTPUT_TOKENS
from benchmarks.peer.client_process import Client
from benchmarks.peer.systems import System

PROMPT_TOKENS = (17, 128, 128, 300, 512, 512)
NEAR_TIE_LOGPROB = 1e-3


class GateRed(Exception):
    """A system wrote something else: its speed means nothing."""


class Passage(msgspec.Struct, frozen=True):
    system: str
    num_prompts: int
    num_tokens: int
    num_near_ties: int


def gate_prompts(seed: int) -> list[tuple[int, ...]]:
    random = Random(f"{seed} gate")
    return [tuple(random_prompt(random, num_tokens)) for num_tokens in PROMPT_TOKENS]


async def expected(reference: System, seed: int) -> list[Choice]:
    """What ours writes, with the logarithms of the two best probabilities of each token."""
    asked = workload.Gate(output_tokens=OUTPUT_TOKENS, near_tie_logprob=NEAR_TIE_LOGPROB)
    async with baton.AsyncClient(reference.grpc_address) as client:
        return await greedy_answers(client, gate_prompts(seed), asked, REQUEST_TIMEOUT_S)


async def check(system: System, client: Client, wanted: Sequence[Choice], seed: int) -> Passage:
    """All prompts at once, so that batching is checked too. Raises GateRed, EngineFailed."""
    bodies = [body(prompt) for prompt in gate_prompts(seed)]
    answers = await ask(system, client, bodies, len(bodies))
    num_near_ties = 0
    for number, (answer, choice) in enumerate(zip(answers, wanted, strict=True)):
        num_near_ties += compare(system.name, number, answer.text.split(), choice)
    return Passage(system.name, len(bodies), len(bodies) * OUTPUT_TOKENS, num_near_ties)


def compare(name: str, number: int, words: Sequence[str], choice: Choice) -> bool:
    """Whether they part at a near tie. Raises GateRed where they part for no such reason."""
    for index, (word, token) in enumerate(zip(words, choice.tokens, strict=True)):
        rival = int(word.removeprefix("t"))
        if rival == token.token_id:
            continue
        logprobs = token.logprobs
        assert logprobs is not None
        gaps = [logprobs.logprob - top.logprob for top in logprobs.top if top.token_id == rival]
        if gaps and abs(gaps[0]) <= NEAR_TIE_LOGPROB:
            return True
        raise GateRed(
            f"{name}: token {index} after prompt {number} ({PROMPT_TOKENS[number]} tokens) is "
            f"{rival}, ours is {token.token_id}, and they are not within {NEAR_TIE_LOGPROB:g}"
        )
    return False
