"""Pools that divide the model and the tokens otherwise: the tokens of one worker."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from baton.protocol.config import ClusterConfig, EngineConfig, ModelConfig, PoolConfig, RouterConfig
from tests.support.clusters import assert_no_residue, running_cluster, settled
from tests.support.prompts import prompt_of
from tests.support.reference import count_near_ties, generate

NUM_TOKENS = 24
LENGTHS = (5, 16, 33, 64, 200)


@pytest.mark.parametrize(
    ("prefill", "decode"), [((2, 16), (1, 32)), ((1, 32), (2, 16))], ids=["2-to-1", "1-to-2"]
)
async def test_ranks_and_block_sizes_may_differ(
    prefill: tuple[int, int], decode: tuple[int, int], tmp_path: Path
) -> None:
    """(ranks, block size) of each pool."""
    config = ClusterConfig(
        version=1,
        model=ModelConfig(path="baton-tiny", dtype="float32"),
        pools=tuple(
            PoolConfig(
                name=role[0],
                role=role,
                tensor_parallel=num_ranks,
                engine=EngineConfig(block_size=block_size, max_num_batched_tokens=128),
            )
            for role, (num_ranks, block_size) in (("prefill", prefill), ("decode", decode))
        ),
        router=RouterConfig(grpc_port=0, http_port=0),
    )
    prompts = [prompt_of(length, seed) for seed, length in enumerate(LENGTHS)]
    async with running_cluster(config, tmp_path) as cluster:
        completions = await asyncio.gather(
            *(
                cluster.client.generate(ids, max_tokens=NUM_TOKENS, temperature=0.0)
                for ids in prompts
            )
        )
        outputs = [[t.token_id for t in c.choices[0].tokens] for c in completions]
        loads = await settled(cluster)
        assert {w.worker_id: w.kv_bytes_received > 0 for w in loads.workers}["d-0"]
        await assert_no_residue(cluster)
    num_ties = sum(count_near_ties(i, t) for i, t in zip(prompts, outputs, strict=True))
    assert num_ties <= 1
    if num_ties == 0:
        assert outputs == [generate(ids, NUM_TOKENS) for ids in prompts]
