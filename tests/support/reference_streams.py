"""Streams that run while something bad happens, checked token for token afterwards."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from tests.support.clusters import Cluster, until
from tests.support.prompts import prompt_of
from tests.support.reference import count_near_ties


@dataclass
class _Run:
    prompt_ids: list[int]
    max_tokens: int
    token_ids: list[int] = field(default_factory=list)


class ReferenceStreams:
    """``async with`` starts them and waits until each has its first tokens; leaving the
    block waits for their end. Any error of a stream is raised there."""

    def __init__(self, cluster: Cluster, num_streams: int, max_tokens: int) -> None:
        self._cluster = cluster
        self._runs = [
            _Run(prompt_of(20 + 7 * seed, 100 + seed), max_tokens) for seed in range(num_streams)
        ]
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def num_running(self) -> int:
        return sum(not task.done() for task in self._tasks)

    @property
    def num_tokens(self) -> int:
        return sum(len(run.token_ids) for run in self._runs)

    async def __aenter__(self) -> ReferenceStreams:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._stream(run)) for run in self._runs]
        await until(
            lambda: all(len(run.token_ids) > 2 for run in self._runs) or self._any_failed(),
            "every stream has begun",
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        if exc[0] is not None:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks)

    def _any_failed(self) -> bool:
        return any(t.done() and not t.cancelled() and t.exception() for t in self._tasks)

    async def _stream(self, run: _Run) -> None:
        async with self._cluster.client.stream(
            run.prompt_ids, max_tokens=run.max_tokens, temperature=0.0, ignore_eos=True
        ) as stream:
            async for chunk in stream:
                run.token_ids += [t.token_id for t in chunk.tokens]

    def assert_exact(self) -> None:
        """Nothing lost, nothing repeated, nothing changed."""
        for run in self._runs:
            assert len(run.token_ids) == run.max_tokens
            count_near_ties(run.prompt_ids, run.token_ids)
