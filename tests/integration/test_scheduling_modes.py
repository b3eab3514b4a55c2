"""Layered prefill, shared prompts and host memory through real processes: the same tokens."""

from __future__ import annotations

import asyncio

from baton.protocol.config import EngineConfig
from tests.support.clusters import assert_no_residue, running_cluster, tiny_config
from tests.support.prompts import prompt_of
from tests.support.reference import count_near_ties

NUM_TOKENS = 24
LENGTHS = [1, 40, 130, 300, 520]


async def test_layered_prefill_and_a_swapping_decode_pool(tmp_path):
    """Every prompt comes twice, each time with two choices, to a decode pool far too small."""
    prompts = [prompt_of(length, seed) for seed, length in enumerate(LENGTHS)] * 2
    config = tiny_config(
        prefill=EngineConfig(prefill_mode="layered", max_num_batched_tokens=64),
        decode=EngineConfig(num_blocks=48, swap_blocks=96, growth_tokens=1, watermark=0.0),
    )
    async with running_cluster(config, tmp_path) as cluster:
        completions = await asyncio.gather(
            *(
                cluster.client.generate(
                    ids, max_tokens=NUM_TOKENS, temperature=0.0, n=2, ignore_eos=True
                )
                for ids in prompts
            )
        )
        await assert_no_residue(cluster)
    num_ties = 0
    for ids, completion in zip(prompts, completions, strict=True):
        for choice in completion.choices:
            tokens = [t.token_id for t in choice.tokens]
            assert len(tokens) == NUM_TOKENS
            num_ties += count_near_ties(ids, tokens)
    print(f"\nnear ties {num_ties}")
    assert num_ties <= 0.01 * len(prompts) * 2 * NUM_TOKENS
