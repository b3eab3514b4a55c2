"""Peers that vanish: clients in mid-stream, and workers killed while they hold requests."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import psutil
import pytest

from tests.support.clusters import (
    RESTART_S,
    assert_no_residue,
    running_cluster,
    tiny_config,
    until,
)
from tests.support.reference_streams import ReferenceStreams


async def test_clients_killed_in_mid_stream(tmp_path):
    """kill -9 of the client process: the workers stop decoding for it and free everything."""
    async with running_cluster(tiny_config(), tmp_path) as cluster:
        clients = [
            await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.fault.vanishing_client",
                cluster.grpc_address,
                stdout=asyncio.subprocess.PIPE,
            )
            for _ in range(3)
        ]
        for client in clients:
            assert client.stdout is not None
            for _ in range(5):
                assert await asyncio.wait_for(client.stdout.readline(), 30), "it streams"
        loads = await cluster.client.loads()
        assert loads.num_running == 3, "the fault hits running requests"
        for client in clients:
            client.send_signal(signal.SIGKILL)
            assert await client.wait() == -signal.SIGKILL
        await assert_no_residue(cluster)


@pytest.mark.parametrize("victim", ["d-0", "p-0"])
async def test_killed_worker_is_replaced_and_no_token_is_lost(tmp_path, victim):
    """kill -9 of a worker: the streams go on elsewhere or after its restart, exactly."""
    config = tiny_config(num_decodes=2)
    async with running_cluster(config, tmp_path, supervise=True) as cluster:
        pid = cluster.pid_of(victim)
        async with ReferenceStreams(cluster, num_streams=6, max_tokens=200) as streams:
            assert streams.num_running == 6
            os.kill(pid, signal.SIGKILL)
            await until(lambda: not psutil.pid_exists(pid), "the victim is dead")
            assert streams.num_running > 0, "it died while streams ran"
        streams.assert_exact()
        restarted = "the victim was started again"
        await until(lambda: cluster.pid_of(victim) != pid, restarted, RESTART_S)
        cluster.idle_fds.clear()
        cluster.idle_tasks.clear()
        await assert_no_residue(cluster)
