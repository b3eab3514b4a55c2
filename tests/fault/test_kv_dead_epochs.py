"""A prefill worker that stood still for longer than its lease goes on sending under an epoch that
is dead by then, while its blocks are another's."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path
from typing import Literal

import msgspec
import psutil

from baton.protocol.config import EngineConfig, KvTransferConfig, RouterConfig
from baton.protocol.messages import AnyMessage, Denied, KvProgress
from tests.support.clusters import RESTART_S, Cluster, assert_no_residue, tiny_config, until
from tests.support.kv_chaos import harmed_cluster
from tests.support.kv_witness import read
from tests.support.prompts import prompt_of
from tests.support.reference import count_near_ties

PROMPT_TOKENS, MAX_TOKENS = 1_024, 400
NUM_BLOCKS = (PROMPT_TOKENS + MAX_TOKENS) // 16 + 4
"""Of the decode worker: whoever runs there has blocks that the one before had."""
RESTS_S = 60.0


async def test_frames_of_a_dead_epoch_arrive_and_write_nothing(tmp_path: Path) -> None:
    """Over shared memory; ``make fault-kv`` does the same over ZeroMQ."""
    await dead_epoch(tmp_path, "shared_memory")


async def dead_epoch(tmp_path: Path, transport: Literal["zeromq", "shared_memory"]) -> None:
    config = tiny_config(
        decode=EngineConfig(num_blocks=NUM_BLOCKS, block_size=16),
        kv_transfer=KvTransferConfig(
            transport=transport, codec="raw", max_frame_bytes=4_096, lease_s=1.0
        ),
        router=RouterConfig(grpc_port=0, http_port=0, worker_lease_s=2.0),
    )
    prefills, decodes = config.pools
    pools = (msgspec.structs.replace(prefills, replicas=2), decodes)
    config = msgspec.structs.replace(config, pools=pools)
    async with harmed_cluster(config, tmp_path, through_proxy=transport == "zeromq") as (
        cluster,
        script,
    ):
        stopped: list[psutil.Process] = []

        def stop_at_progress(peer: str, message: AnyMessage) -> None:
            if isinstance(message, KvProgress) and message.num_frames >= 2 and not stopped:
                stopped.append(psutil.Process(cluster.pid_of(peer)))
                os.kill(stopped[0].pid, signal.SIGSTOP)
                # It would learn from it that the epoch is dead, and send no more.
                script.block = (Denied,)

        script.watch = stop_at_progress
        prompt_ids = prompt_of(PROMPT_TOKENS, 77)
        token_ids: list[int] = []
        reading = asyncio.create_task(_read(cluster, prompt_ids, token_ids))
        try:
            await until(lambda: bool(stopped) or reading.done(), "it is stopped in mid-transfer")
            (victim,) = stopped
            try:
                await until(lambda: victim.status() == psutil.STATUS_STOPPED, "it stands still")
                begun = "another brought the KV to the same blocks"
                await until(lambda: len(token_ids) > 3 or reading.done(), begun, RESTS_S)
                assert not reading.done()
                await asyncio.sleep(0.3)  # For the witness to say what it saw.
                before = read(tmp_path, "d-0")
                assert victim.status() == psutil.STATUS_STOPPED
                if transport == "shared_memory":
                    _assert_own_rings(cluster)
            finally:
                os.kill(victim.pid, signal.SIGCONT)
            await until(
                lambda: read(tmp_path, "d-0").num_dead_frames > before.num_dead_frames,
                f"frames of the dead epoch arrive; {before} before",
            )
            await asyncio.wait_for(reading, RESTS_S)
        finally:
            reading.cancel()
            await asyncio.wait([reading])
        after = read(tmp_path, "d-0")
        assert after.num_let_in == before.num_let_in, "nothing of them was written"
        assert after.num_corrupt == 0
        script.block = ()
        assert len(token_ids) == MAX_TOKENS
        await asyncio.to_thread(count_near_ties, prompt_ids, token_ids)
        loads = await cluster.client.loads()
        carried = {link.transport for w in loads.workers for link in w.kv_links if link.num_bytes}
        assert carried == {transport}
        await _replaced(cluster, victim.pid)
        await assert_no_residue(cluster)


async def _replaced(cluster: Cluster, pid: int) -> None:
    """The router has given it up for its silence: supervision ends it and starts another."""
    supervisor = asyncio.ensure_future(cluster.controller.supervise())
    try:
        gone = "what was given up was ended, and another started"
        await until(lambda: pid not in cluster.pids or supervisor.done(), gone, RESTART_S)
        assert not psutil.pid_exists(pid)
        cluster.idle_fds.clear()
        cluster.idle_tasks.clear()
    finally:
        supervisor.cancel()
        await asyncio.wait([supervisor])


async def _read(cluster: Cluster, prompt_ids: list[int], token_ids: list[int]) -> None:
    async with cluster.client.stream(
        prompt_ids, max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True
    ) as stream:
        async for chunk in stream:
            token_ids += [token.token_id for token in chunk.tokens]


def _assert_own_rings(cluster: Cluster) -> None:
    """No sender maps another's ring, and the receiver can only read: what is written into a
    ring, whenever, changes neither KV blocks nor slots of anyone else."""
    first, second = (_rings(cluster.pid_of(p)) for p in ("p-0", "p-1"))
    assert first
    assert second
    assert not first.keys() & second.keys()
    received = _rings(cluster.pid_of("d-0"))
    assert received.keys() == first.keys() | second.keys()
    assert all("w" not in mode for mode in received.values())


def _rings(pid: int) -> dict[str, str]:
    """Inode to mode of each KV ring that a process maps."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    found = re.findall(r"^\S+ (\S+) \S+ \S+ (\d+) +/memfd:baton-kv", maps, re.MULTILINE)
    return {inode: mode for mode, inode in found}
