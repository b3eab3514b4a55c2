"""Drafts through real processes: several tokens a step, and every one as without them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from baton.protocol.config import EngineConfig
from tests.support.clusters import (
    Cluster,
    assert_no_residue,
    running_cluster,
    settled,
    tiny_config,
)

LOOP = "for i in range(10):\n    total += i\n    print(i, total)\n"
PROMPTS = [LOOP * 3, "def area(w, h):\n    return w * h\n\n" * 4, "import os\nimport sys\n" * 6]


async def outputs(cluster: Cluster) -> list[tuple[str, str | int | None, list[int]]]:
    """Greedy and sampled, some ended by a stop string in the middle of what repeats."""
    found = await asyncio.gather(
        *(
            cluster.client.generate(
                prompt, max_tokens=80, temperature=temperature, seed=5, stop=stop, ignore_eos=True
            )
            for prompt in PROMPTS
            for temperature in (0.0, 0.7)
            for stop in ([], ["total += i\n    pr", "w * h\n\nd", "sys\nimport o"])
        )
    )
    return [
        (c.text, c.choices[0].stop_reason, [t.token_id for t in c.choices[0].tokens]) for c in found
    ]


async def test_split_says_the_same_with_drafts_and_without(tmp_path: Path) -> None:
    async with running_cluster(tiny_config(), tmp_path) as cluster:
        plain = await outputs(cluster)
        before = await settled(cluster)
        await assert_no_residue(cluster)
    drafting = EngineConfig(speculation="prompt_lookup")
    config = tiny_config(prefill=drafting, decode=drafting)
    async with running_cluster(config, tmp_path) as cluster:
        guessed = await outputs(cluster)
        after = await settled(cluster)
        await assert_no_residue(cluster)
    assert guessed == plain
    assert any(stop is not None for _, stop, _ in plain)
    steps = [{w.worker_id: w.step_count for w in loads.workers}["d-0"] for loads in (before, after)]
    assert steps[1] < steps[0], "several tokens came of a step"
