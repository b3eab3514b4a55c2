"""Hand-overs over a socket, coded: tokens are those of raw ones, and the timeline says so."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from baton.protocol.config import EngineConfig, KvTransferConfig
from tests.support.clusters import assert_no_residue, running_cluster, settled, tiny_config
from tests.support.prompts import prompt_of
from tests.support.reference import count_near_ties, generate

PROMPTS = [prompt_of(length, seed) for seed, length in enumerate([1, 40, 300, 600])]
KV_BYTES_PER_TOKEN = 6 * 2 * 2 * 64 * 4  # layers, K and V, KV heads, head_dim, float32
NUM_TOKENS = 24


@pytest.mark.parametrize("codec", ["auto", "split"])
async def test_what_went_through_a_lossless_codec_gives_the_same_tokens(
    tmp_path: Path, codec: str
) -> None:
    transfer = KvTransferConfig(transport="zeromq", codec=codec)
    small_steps = EngineConfig(max_num_batched_tokens=128)
    async with running_cluster(
        tiny_config(prefill=small_steps, kv_transfer=transfer), tmp_path
    ) as cluster:
        completions = await asyncio.gather(
            *(
                cluster.client.generate(ids, max_tokens=NUM_TOKENS, temperature=0.0)
                for ids in PROMPTS
            )
        )
        loads = await settled(cluster)
        await assert_no_residue(cluster)
    for ids, completion in zip(PROMPTS, completions, strict=True):
        tokens = [t.token_id for t in completion.choices[0].tokens]
        if not count_near_ties(ids, tokens):
            assert tokens == generate(ids, NUM_TOKENS)
        timeline = completion.choices[0].timeline
        assert timeline is not None
        [span] = [s for s in timeline.spans if s.name == "transfer"]
        num_sent = len(ids) - int(span.attributes["recomputed_tokens"])
        assert span.attributes["raw_bytes"] == num_sent * KV_BYTES_PER_TOKEN
        assert span.attributes["exposed_ms"] >= 0.0
        if codec == "split":
            assert num_sent == len(ids)
            assert span.attributes["codec"] == "split"
            assert span.attributes["bytes"] != span.attributes["raw_bytes"]
    received = sum(w.kv_bytes_received for w in loads.workers)
    sent = sum(w.kv_bytes_sent for w in loads.workers)
    assert received == sent
