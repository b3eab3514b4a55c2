"""A worker that dies with grammars and drafts in it: they are made again from the output."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path
from typing import Any

from baton import AsyncClient
from baton.protocol.config import EngineConfig
from tests.support.clusters import assert_no_residue, running_cluster, tiny_config
from tests.support.prompts import prompt_of

WORDS = r"([a-z]{2,6} ){60}[a-z]+\."
NUM_STREAMS = 4


async def test_structured_output_goes_on_elsewhere_with_the_same_tokens(tmp_path: Path) -> None:
    config = tiny_config(num_decodes=2, decode=EngineConfig(speculation="prompt_lookup"))
    async with running_cluster(config, tmp_path, supervise=True) as cluster:
        undisturbed = await asyncio.gather(*(_words(cluster.client, n) for n in range(NUM_STREAMS)))
        under_way = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_words(cluster.client, n, under_way)) for n in range(NUM_STREAMS)
            ]
            await under_way.wait()
            os.kill(cluster.pid_of("d-0"), signal.SIGKILL)
            assert not all(task.done() for task in tasks), "it died while streams ran"
        cluster.idle_fds.clear()
        cluster.idle_tasks.clear()
        await assert_no_residue(cluster)
    found = [task.result() for task in tasks]
    assert [tokens for _, tokens, _ in found] == [tokens for _, tokens, _ in undisturbed]
    assert any(attempts > 1 for _, _, attempts in found), "some went on elsewhere"
    for text, _, _ in found:
        assert re.fullmatch(WORDS, text)


async def _words(
    client: AsyncClient, seed: int, under_way: asyncio.Event | None = None
) -> tuple[str, list[int], Any]:
    """Text, tokens and attempts. ``under_way`` is set when a part of them is here."""
    text, tokens, attempts = "", [], None
    async with client.stream(
        prompt_of(30, seed), max_tokens=400, temperature=1.0, seed=seed, regex=WORDS
    ) as stream:
        async for chunk in stream:
            text += chunk.text
            tokens += [token.token_id for token in chunk.tokens]
            if under_way is not None and len(tokens) > 20:
                under_way.set()
            if chunk.timeline is not None:
                spans = {span.name: span for span in chunk.timeline.spans}
                attempts = spans["decode"].attributes["attempts"]
    return text, tokens, attempts
