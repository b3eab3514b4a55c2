"""What moving the KV of one 512-token prompt (8 MiB) takes, as each side's own clocks say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random
from statistics import median

import msgspec

import baton
from benchmarks.engine.cases import random_prompt
from benchmarks.engine.checkpoint import kv_bytes_per_token
from benchmarks.engine.engine_process import EngineFailed
from benchmarks.peer.ask import REQUEST_TIMEOUT_S, ask, body, wake
from benchmarks.peer.client_process import Client
from benchmarks.peer.processes import get
from benchmarks.peer.systems import OURS, System

PROMPT_TOKENS = 512
OUTPUT_TOKENS = 4


class Transfer(msgspec.Struct, frozen=True):
    """Milliseconds of one transfer.

    Ours: from the end of prefill to commit, as the workers measure it, whatever was sent before;
    whole_ms counts from the first frame, so it may hold prefill. The peer's: a read as its
    connector measures it, which begins after prefill, from asking for it to seeing that it is done;
    single ones are not known.
    """

    system: str
    num: int
    megabytes: float
    mean_ms: float
    median_ms: float | None
    best_ms: float | None
    whole_ms: float | None
    how: str


async def transfer(system: System, client: Client, count: int, seed: int) -> Transfer:
    """One prompt after the other on an idle system; one before them wakes it."""
    random = Random(f"{seed} transfer")
    prompts = [random_prompt(random, PROMPT_TOKENS) for _ in range(1 + count)]
    try:
        await wake(system, client, [body(prompts[0], max_tokens=OUTPUT_TOKENS)])
        if system.engine == OURS:
            return await _ours(system, prompts[1:])
        return await _peers(system, client, prompts[1:])
    finally:
        system.pause()


async def _ours(system: System, prompts: Sequence[Sequence[int]]) -> Transfer:
    times_ms, whole_ms = [], []
    said: set[str] = set()
    async with baton.AsyncClient(system.grpc_address) as client:
        for prompt in prompts:
            done = await client.generate(
                prompt,
                max_tokens=OUTPUT_TOKENS,
                temperature=0.0,
                ignore_eos=True,
                timeout=REQUEST_TIMEOUT_S,
            )
            timeline = done.choices[0].timeline
            spans = [s for s in timeline.spans if s.name == "transfer"] if timeline else []
            if not spans:
                raise EngineFailed(f"{system.name}: its timeline names no transfer")
            times_ms.append(float(spans[0].attributes["exposed_ms"]))
            whole_ms.append(spans[0].duration_ms)
            said.add(f"{spans[0].attributes['codec']} over {spans[0].attributes['transport']}")
    return Transfer(
        system.name,
        len(times_ms),
        PROMPT_TOKENS * kv_bytes_per_token(4) / 1e6,
        sum(times_ms) / len(times_ms),
        median(times_ms),
        min(times_ms),
        median(whole_ms),
        ", ".join(sorted(said)),
    )


async def _peers(system: System, client: Client, prompts: Sequence[Sequence[int]]) -> Transfer:
    bodies = [body(prompt, max_tokens=OUTPUT_TOKENS) for prompt in prompts]
    before = await _metrics(system)
    await ask(system, client, bodies, 1)
    after = await _metrics(system)
    num, seconds, num_bytes = (b - a for a, b in zip(before, after, strict=True))
    if not num:
        raise EngineFailed(f"{system.name}: its metrics name no transfer")
    return Transfer(
        system.name,
        round(num),
        num_bytes / num / 1e6,
        1e3 * seconds / num,
        None,
        None,
        None,
        "raw over NIXL (UCX)",
    )


async def _metrics(system: System) -> tuple[float, float, float]:
    """Transfers so far, their seconds and bytes."""
    text = await get(system.decode_port, "/metrics")

    def of(name: str) -> float:
        found = re.search(rf"^vllm:nixl_{name}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    return of("xfer_time_seconds_count"), of("xfer_time_seconds_sum"), of("bytes_transferred_sum")
