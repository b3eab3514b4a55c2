"""Many streams at once, some of them given up: the rest are right and nothing is left."""

from __future__ import annotations

import asyncio
import random

from tests.support.clusters import Cluster, assert_no_residue, running_cluster, tiny_config
from tests.support.prompts import prompt_of
from tests.support.reference import count_near_ties

NUM_STREAMS = 64
NUM_CANCELLED = 20


async def _stream(
    cluster: Cluster, prompt_ids: list[int], max_tokens: int, cancel_after: int | None
) -> list[int]:
    """Token ids as they came; leaves the stream (which cancels it) after so many."""
    ids: list[int] = []
    async with cluster.client.stream(
        prompt_ids, max_tokens=max_tokens, temperature=0.0, ignore_eos=True
    ) as stream:
        if cancel_after == 0:
            return ids
        async for chunk in stream:
            ids += [t.token_id for t in chunk.tokens]
            if cancel_after is not None and len(ids) >= cancel_after:
                break
    return ids


async def test_64_streams_of_which_20_are_cancelled(tmp_path):
    rng = random.Random(5)
    prompts = [prompt_of(rng.choice([3, 20, 60, 150, 400]), seed) for seed in range(NUM_STREAMS)]
    lengths = [rng.choice([1, 2, 16, 40, 64]) for _ in prompts]
    cancelled = rng.sample([i for i, n in enumerate(lengths) if n >= 16], NUM_CANCELLED)
    cancel_after = {i: rng.randrange(0, lengths[i] // 2) for i in cancelled}
    async with running_cluster(tiny_config(), tmp_path) as cluster:
        outputs = await asyncio.gather(
            *(
                _stream(cluster, prompts[i], lengths[i], cancel_after.get(i))
                for i in range(NUM_STREAMS)
            )
        )
        await assert_no_residue(cluster)
    num_ties = 0
    for i, ids in enumerate(outputs):
        if i in cancel_after:
            assert len(ids) < lengths[i], "it was cancelled before its end"
        else:
            assert len(ids) == lengths[i]
        if ids:
            num_ties += count_near_ties(prompts[i], ids)
    print(f"\n{NUM_STREAMS} streams, {NUM_CANCELLED} cancelled, {num_ties} near ties")
