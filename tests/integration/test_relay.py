"""One request's whole way through real processes, held against transformers and one engine."""

from __future__ import annotations

import asyncio

import pytest

from baton.protocol.config import EngineConfig
from tests.support.clusters import (
    Cluster,
    assert_no_residue,
    colocated_config,
    running_cluster,
    settled,
    tiny_config,
)
from tests.support.prompts import prompt_of
from tests.support.reference import count_near_ties, generate

LENGTHS = [1, 2, 15, 16, 17, 33, 64, 100, 127, 128, 129, 200, 256, 300, 511, 513, 600, 48, 80, 31]
NUM_TOKENS = 48
KV_BYTES_PER_TOKEN = 6 * 2 * 2 * 64 * 4  # layers, K and V, KV heads, head_dim, float32


async def _greedy_outputs(cluster: Cluster, prompts: list[list[int]]) -> list[list[int]]:
    completions = await asyncio.gather(
        *(cluster.client.generate(ids, max_tokens=NUM_TOKENS, temperature=0.0) for ids in prompts)
    )
    return [[t.token_id for t in c.choices[0].tokens] for c in completions]


async def test_split_equals_colocated_equals_transformers(tmp_path):
    """1P+1D as Ray actors, two mixed replicas, and ``transformers.generate``: the same tokens."""
    prompts = [prompt_of(length, seed) for seed, length in enumerate(LENGTHS)]
    small_steps = EngineConfig(max_num_batched_tokens=128)
    async with running_cluster(tiny_config(prefill=small_steps), tmp_path, "ray") as cluster:
        before = await settled(cluster)
        split = await _greedy_outputs(cluster, prompts)
        after = await settled(cluster)
        await assert_no_residue(cluster)
    async with running_cluster(colocated_config(2), tmp_path) as cluster:
        colocated = await _greedy_outputs(cluster, prompts)
        await assert_no_residue(cluster)

    num_ties = sum(
        count_near_ties(i, t) for i, t in zip(prompts * 2, split + colocated, strict=True)
    )
    num_tokens = sum(map(len, split + colocated))
    print(f"\n{len(prompts)} prompts, {num_tokens} tokens: {num_ties} near ties")
    assert num_ties <= 0.001 * num_tokens
    if num_ties == 0:
        assert split == colocated == [generate(ids, NUM_TOKENS) for ids in prompts]

    moved = [
        len(ids) * KV_BYTES_PER_TOKEN
        for ids, tokens in zip(prompts, split, strict=True)
        if len(tokens) > 1
    ]
    sent = {w.worker_id: w.kv_bytes_sent for w in after.workers}["p-0"]
    sent -= {w.worker_id: w.kv_bytes_sent for w in before.workers}["p-0"]
    assert sent == sum(moved), "each prompt's KV crossed exactly once"


async def test_first_token_that_is_the_last_moves_no_kv(tmp_path):
    async with running_cluster(tiny_config(), tmp_path) as cluster:
        before = await settled(cluster)
        completion = await cluster.client.generate(prompt_of(40, 1), max_tokens=1, temperature=0.0)
        after = await settled(cluster)
        assert len(completion.choices[0].tokens) == 1
        timeline = completion.choices[0].timeline
        assert timeline is not None
        assert [s.name for s in timeline.spans] == ["queued", "prefill", "first_token"]
        assert [w.kv_bytes_sent for w in after.workers] == [w.kv_bytes_sent for w in before.workers]
        await assert_no_residue(cluster)


async def test_timeline_tells_each_hop(tmp_path):
    async with running_cluster(tiny_config(), tmp_path) as cluster:
        completion = await cluster.client.generate(
            prompt_of(64, 2), max_tokens=8, temperature=0.0, ignore_eos=True
        )
        timeline = completion.choices[0].timeline
        assert timeline is not None
        spans = {s.name: s for s in timeline.spans}
        assert list(spans) == ["queued", "prefill", "first_token", "transfer", "decode"]
        assert spans["transfer"].attributes["bytes"] == 64 * KV_BYTES_PER_TOKEN
        assert spans["transfer"].attributes["codec"] == "raw"
        assert spans["transfer"].attributes["transport"] == "shared_memory"
        assert spans["decode"].attributes["tokens"] == 7
        assert timeline.tpot_ms is not None
        await assert_no_residue(cluster)


async def test_seeded_sampling_is_the_same_split_and_colocated(tmp_path):
    """Draws are keyed by (seed, position): who computes them does not matter."""
    prompts = [prompt_of(20 + 13 * seed, seed) for seed in range(8)]

    async def sampled(cluster: Cluster) -> list[list[int]]:
        completions = await asyncio.gather(
            *(
                cluster.client.generate(
                    ids, max_tokens=32, temperature=0.9, top_p=0.95, top_k=50, seed=seed, n=2
                )
                for seed, ids in enumerate(prompts)
            )
        )
        return [[t.token_id for t in choice.tokens] for c in completions for choice in c.choices]

    async with running_cluster(tiny_config(), tmp_path) as cluster:
        split = await sampled(cluster)
        await assert_no_residue(cluster)
    async with running_cluster(colocated_config(), tmp_path) as cluster:
        colocated = await sampled(cluster)
        await assert_no_residue(cluster)
    assert split == colocated
    assert any(a != b for a, b in zip(split[::2], split[1::2], strict=True)), "n draws differ"


@pytest.mark.parametrize("num_streams", [64])
async def test_decode_pool_far_too_small(tmp_path, num_streams):
    """64 streams over 32 decode blocks, a quarter of what they need in total: all finish
    exactly, and preemption, parking and back-pressure each happened."""
    prompts = [prompt_of(10 + seed % 6, seed) for seed in range(num_streams)]
    lengths = [32 - len(ids) for ids in prompts]
    config = tiny_config(
        prefill=EngineConfig(num_blocks=16, max_num_batched_tokens=128),
        decode=EngineConfig(num_blocks=32, growth_tokens=1, watermark=0.0),
    )
    async with running_cluster(config, tmp_path) as cluster:
        completions = await asyncio.gather(
            *(
                cluster.client.generate(ids, max_tokens=n, temperature=0.0, ignore_eos=True)
                for ids, n in zip(prompts, lengths, strict=True)
            )
        )
        loads = await settled(cluster)
        await assert_no_residue(cluster)
    blocks_needed = sum(-(-(len(i) + n) // 16) for i, n in zip(prompts, lengths, strict=True))
    assert blocks_needed == 4 * 32
    num_ties = 0
    for ids, n, completion in zip(prompts, lengths, completions, strict=True):
        ours = [t.token_id for t in completion.choices[0].tokens]
        assert len(ours) == n
        num_ties += count_near_ties(ids, ours)
    workers = {w.worker_id: w for w in loads.workers}
    print(
        f"\npreemptions {workers['d-0'].num_preemptions}, parked {workers['p-0'].num_parked}, "
        f"back-pressure p {workers['p-0'].num_backpressured} "
        f"d {workers['d-0'].num_backpressured}, near ties {num_ties}"
    )
    assert workers["d-0"].num_preemptions > 0
    assert workers["p-0"].num_parked > 0
    assert workers["p-0"].num_backpressured > 0
    assert workers["d-0"].num_backpressured > 0
