"""Jobs for one system: the same bodies for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from benchmarks.engine.engine_process import EngineFailed
from benchmarks.peer.cases import OUTPUT_TOKENS
from benchmarks.peer.client_process import Client
from benchmarks.peer.job import Answered, Job
from benchmarks.peer.systems import HOST, SERVED_NAME, System

REQUEST_TIMEOUT_S = 120.0
WAKE_ATTEMPTS = 3


def body(prompt: Sequence[int], **further: Any) -> bytes:
    """Greedy, of an exact length; the prompt is token ids, so that no tokeniser counts."""
    return msgspec.json.encode(
        {
            "model": SERVED_NAME,
            "prompt": prompt,
            "max_tokens": OUTPUT_TOKENS,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **further,
        }
    )


async def ask(
    system: System, client: Client, bodies: Sequence[bytes], concurrency: int
) -> tuple[Answered, ...]:
    """Raises EngineFailed when an answer is not complete: times of failures say nothing."""
    job = Job(HOST, system.port, tuple(bodies), concurrency, REQUEST_TIMEOUT_S)
    answers = await client.run(job)
    problems = [answer.error for answer in answers if answer.error]
    if problems:
        raise EngineFailed(
            f"{system.name}: {len(problems)} of {len(answers)} requests failed, the first one "
            f"because {problems[0]}"
        )
    return answers


async def wake(system: System, client: Client, bodies: Sequence[bytes]) -> None:
    """Let a system that was stopped run again, until it answers.

    Connections between its processes may have gone out of date while it was stopped, and the first
    requests pay for it. Raises EngineFailed.
    """
    system.resume()
    for attempt in range(WAKE_ATTEMPTS):
        try:
            await ask(system, client, bodies, len(bodies))
        except EngineFailed:
            if attempt + 1 == WAKE_ATTEMPTS:
                raise
        else:
            return
