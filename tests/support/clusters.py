"""Real clusters for tests: started, looked into from outside, and shown to leave nothing.

``running_cluster`` starts one (Ray actors or bare processes). ``assert_no_residue`` is how
integration and fault tests end: the workers' own counts, and what the operating system
says of their processes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from baton import AsyncClient
from baton.client import Loads
from baton.protocol.config import (
    ClusterConfig,
    EngineConfig,
    KvTransferConfig,
    ModelConfig,
    PoolConfig,
    RouterConfig,
)
from cluster.controller import Controller
from cluster.launcher import Launcher
from cluster.leftovers import Leftovers
from cluster.serve import LauncherName, make_launcher, running

SETTLE_S = 20.0
RESTART_S = 120.0
"""For a worker that is started again: its processes import torch, on whatever else runs here."""
POLL_S = 0.05
WARM_UP = "import os\n" * 32
"""Long enough that its KV is sent without a copy: pyzmq then opens, once, a context of its own."""


def tiny_config(
    *,
    prefill: EngineConfig | None = None,
    decode: EngineConfig | None = None,
    num_decodes: int = 1,
    kv_transfer: KvTransferConfig | None = None,
    router: RouterConfig | None = None,
) -> ClusterConfig:
    """1P+1D of baton-tiny in float32 on free ports."""
    return ClusterConfig(
        version=1,
        model=ModelConfig(path="baton-tiny", dtype="float32"),
        pools=(
            PoolConfig(name="p", role="prefill", engine=prefill or EngineConfig()),
            PoolConfig(
                name="d", role="decode", replicas=num_decodes, engine=decode or EngineConfig()
            ),
        ),
        kv_transfer=kv_transfer or KvTransferConfig(),
        router=router or RouterConfig(grpc_port=0, http_port=0),
    )


def colocated_config(num_replicas: int = 1) -> ClusterConfig:
    return ClusterConfig(
        version=1,
        model=ModelConfig(path="baton-tiny", dtype="float32"),
        pools=(PoolConfig(name="m", role="mixed", replicas=num_replicas),),
        router=RouterConfig(grpc_port=0, http_port=0),
    )


@dataclass
class Cluster:
    """``idle_fds`` and ``idle_tasks``: what each process has when nothing runs, once warm."""

    controller: Controller
    client: AsyncClient
    idle_fds: dict[int, int] = field(default_factory=dict)
    idle_tasks: dict[str, int] = field(default_factory=dict)

    @property
    def grpc_address(self) -> str:
        return self.controller.router.grpc_address

    @property
    def http_url(self) -> str:
        return f"http://{self.controller.router.http_address}"

    @property
    def pids(self) -> list[int]:
        return [self.controller.router.pid, *(w.pid for w in self.controller.workers)]

    def pid_of(self, worker_id: str) -> int:
        return next(w.pid for w in self.controller.workers if w.worker_id == worker_id)

    def listening(self) -> Iterator[tuple[int, int]]:
        """(pid, port) of every TCP socket on which a process of the cluster listens."""
        for pid in self.pids:
            for connection in psutil.Process(pid).net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    yield pid, connection.laddr.port

    async def note_idle(self) -> None:
        """Call when warm and idle; ``assert_no_residue`` compares with it."""
        loads = await settled(self)
        self.idle_fds = {pid: psutil.Process(pid).num_fds() for pid in self.pids}
        self.idle_tasks = {w.worker_id: w.num_tasks for w in loads.workers}


@contextlib.asynccontextmanager
async def running_cluster(
    config: ClusterConfig,
    log_dir: Path,
    launcher: LauncherName = "process",
    *,
    supervise: bool = False,
    made: Launcher | None = None,
) -> AsyncIterator[Cluster]:
    """A warm cluster; afterwards no process of it is left (asserted). ``made`` starts it, in
    place of what ``launcher`` names."""
    leftovers = Leftovers()
    made = made or make_launcher(config, launcher, None, log_dir if launcher == "process" else None)
    async with running(config, made, lambda line: None) as controller:
        async with AsyncClient(controller.router.grpc_address) as client:
            cluster = Cluster(controller, client)
            await client.generate(WARM_UP, max_tokens=4, temperature=0.0, ignore_eos=True)
            await cluster.note_idle()
            supervisor = asyncio.ensure_future(controller.supervise()) if supervise else None
            try:
                yield cluster
            finally:
                if supervisor is not None:
                    supervisor.cancel()
                    await asyncio.wait([supervisor])
        assert leftovers.note() >= len(cluster.pids)
        await controller.stop(5.0)
    assert leftovers.find() == []


async def until(condition: Callable[[], bool], what: str, timeout_s: float = SETTLE_S) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout_s
    while not condition():
        if loop.time() > end:
            pytest.fail(f"not within {timeout_s} s: {what}")
        await asyncio.sleep(POLL_S)


async def settled(cluster: Cluster, timeout_s: float = SETTLE_S) -> Loads:
    """Loads, reported after this call, in which nothing runs; fails with what still does."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    end = began + timeout_s
    while True:
        loads = await cluster.client.loads()
        elapsed_s = loop.time() - began
        stale = [w.worker_id for w in loads.workers if w.age_s >= elapsed_s]
        busy = [f"no report of {stale} yet"] if stale else _busy(loads)
        if not busy:
            return loads
        if loop.time() > end:
            pytest.fail(f"still there after {timeout_s} s: {busy}")
        await asyncio.sleep(POLL_S)


def _busy(loads: Loads) -> list[str]:
    busy = []
    if loads.num_queued or loads.num_running:
        busy.append(f"router: {loads.num_queued} queued, {loads.num_running} running")
    for w in loads.workers:
        if w.state != "up":
            busy.append(f"{w.worker_id} is {w.state}")
        held = w.num_blocks - w.num_free_blocks
        if held or w.num_running or w.num_waiting or w.num_leases or w.num_blocks == 0:
            busy.append(
                f"{w.worker_id}: {held} blocks, {w.num_running} running, "
                f"{w.num_waiting} waiting, {w.num_leases} leases"
            )
    return busy


async def assert_no_residue(cluster: Cluster) -> None:
    """No block, lease, task or socket is left, and the workers' integrity checks agree."""
    loads = await settled(cluster)
    assert {w.worker_id: w.integrity_errors for w in loads.workers} == {
        w.worker_id: () for w in loads.workers
    }
    for worker in loads.workers:
        if worker.worker_id in cluster.idle_tasks:
            assert worker.num_tasks <= cluster.idle_tasks[worker.worker_id], worker
    idle = cluster.idle_fds

    def fds() -> dict[int, int]:
        return {pid: psutil.Process(pid).num_fds() for pid in cluster.pids if pid in idle}

    await until(
        lambda: all(count <= idle[pid] for pid, count in fds().items()),
        f"file descriptors back to {idle}, now {fds()}",
    )
