"""The whole relay over each transport that a configuration can name: the bytes went that way and
no other, and the tokens are the same."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from baton.client import Loads
from baton.protocol.config import EngineConfig, KvTransferConfig
from tests.integration.test_relay import KV_BYTES_PER_TOKEN
from tests.support.clusters import assert_no_residue, running_cluster, settled, tiny_config
from tests.support.prompts import prompt_of
from tests.support.reference import count_near_ties

LENGTHS = [1, 16, 33, 128, 300, 511]
NUM_TOKENS = 12
REASONS = {
    "auto": "same host: the peer answered on a socket of this kernel",
    "shared_memory": "asked for by kv_transfer.transport: shared_memory",
    "zeromq": "asked for by kv_transfer.transport: zeromq",
    "zeromq_ipc": "asked for by kv_transfer.transport: zeromq_ipc",
    "gloo": "asked for by kv_transfer.transport: gloo",
}


def carried(loads: Loads) -> tuple[dict[tuple[str, str], int], dict[str, int]]:
    """Bytes sent by (peer, transport), and bytes received by transport."""
    workers = {w.worker_id: w for w in loads.workers}
    sent = {(link.peer, link.transport): link.num_bytes for link in workers["p-0"].kv_links}
    received = {link.transport: link.num_bytes for link in workers["d-0"].kv_links}
    return sent, received


@pytest.mark.parametrize("wanted", REASONS)
async def test_every_byte_goes_by_the_transport_that_was_asked_for(
    wanted: str, tmp_path: Path
) -> None:
    used = "shared_memory" if wanted == "auto" else wanted
    config = tiny_config(
        prefill=EngineConfig(max_num_batched_tokens=128),
        kv_transfer=KvTransferConfig(transport=wanted, codec="raw"),  # type: ignore[arg-type]
    )
    prompts = [prompt_of(length, seed) for seed, length in enumerate(LENGTHS)]
    async with running_cluster(config, tmp_path) as cluster:
        before = carried(await settled(cluster))
        completions = await asyncio.gather(
            *(
                cluster.client.generate(
                    ids, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True
                )
                for ids in prompts
            )
        )
        loads = await settled(cluster)
        after = carried(loads)
        await assert_no_residue(cluster)
    moved = sum(LENGTHS) * KV_BYTES_PER_TOKEN
    assert after[0].keys() == {("d-0", used)}
    assert after[1].keys() == {used}
    assert after[0]["d-0", used] - before[0]["d-0", used] == moved
    assert after[1][used] - before[1][used] == moved
    prefill = next(w for w in loads.workers if w.worker_id == "p-0")
    assert prefill.kv_links[0].reason == REASONS[wanted]
    assert prefill.kv_transport == used
    for ids, completion in zip(prompts, completions, strict=True):
        tokens = [t.token_id for t in completion.choices[0].tokens]
        assert len(tokens) == NUM_TOKENS
        assert count_near_ties(ids, tokens) == 0, "the tokens that transformers makes"
        transfer = next(s for s in completion.choices[0].timeline.spans if s.name == "transfer")  # type: ignore[union-attr]
        assert transfer.attributes["transport"] == used
