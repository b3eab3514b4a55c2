"""A router that does not run for a while: it was the one that was away, not its workers."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil

from baton import Chunk
from baton.messaging.sockets import HEARTBEAT_TIMEOUT_MS
from baton.protocol.config import RouterConfig
from baton.worker.router_leases import ROUTER_LEASE_S
from tests.support.clusters import Cluster, assert_no_residue, running_cluster, tiny_config, until
from tests.support.prompts import prompt_of
from tests.support.reference import count_near_ties

LEASE_S = 3.0
STOP_S = 7.0
"""Over the lease, and over what connections live without a heartbeat: reports sent meanwhile are
lost with these. Under the time for which workers keep the requests of a silent router."""
MAX_TOKENS = 400


async def test_a_stopped_router_goes_on_with_the_workers_it_had(tmp_path: Path) -> None:
    """SIGSTOP for two leases and more, then SIGCONT: the stream continues where it was."""
    assert max(LEASE_S, HEARTBEAT_TIMEOUT_MS / 1e3) < STOP_S < ROUTER_LEASE_S
    router_config = RouterConfig(grpc_port=0, http_port=0, worker_lease_s=LEASE_S)
    async with running_cluster(tiny_config(router=router_config), tmp_path) as cluster:
        prompt_ids = prompt_of(20, 7)
        chunks: list[Chunk] = []
        reading = asyncio.create_task(_read(cluster, prompt_ids, chunks))
        try:
            await until(lambda: len(chunks) > 3 or reading.done(), "the stream has begun")
            router = psutil.Process(cluster.controller.router.pid)
            os.kill(router.pid, signal.SIGSTOP)
            try:
                await until(lambda: router.status() == psutil.STATUS_STOPPED, "it stands still")
                used = router.cpu_times()
                await asyncio.sleep(STOP_S)
                assert router.cpu_times() == used, "it did nothing meanwhile"
                assert not reading.done(), "the stop is in mid-stream"
            finally:
                os.kill(router.pid, signal.SIGCONT)
            await asyncio.wait_for(reading, 60)
        finally:
            reading.cancel()
            await asyncio.wait([reading])
        token_ids = [token.token_id for chunk in chunks for token in chunk.tokens]
        assert len(token_ids) == MAX_TOKENS
        count_near_ties(prompt_ids, token_ids)
        timeline = chunks[-1].timeline
        assert timeline is not None
        assert timeline.spans[-1].attributes["attempts"] == 1, "it was placed once"
        assert "the router did not run for" in _log_of_the_router(tmp_path)
        await assert_no_residue(cluster)


async def _read(cluster: Cluster, prompt_ids: list[int], chunks: list[Chunk]) -> None:
    async with cluster.client.stream(
        prompt_ids, max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True
    ) as stream:
        async for chunk in stream:
            chunks.append(chunk)


def _log_of_the_router(folder: Path) -> str:
    return "".join(p.read_text() for p in folder.glob("router*.log"))
