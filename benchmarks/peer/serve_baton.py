"""Ours as 1 prefill + 1 decode worker, or as two mixed workers, each on one core."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil

from baton.protocol.config import (
    ClusterConfig,
    EngineConfig,
    ModelConfig,
    PoolConfig,
    RouterConfig,
)
from benchmarks.peer.systems import (
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    OURS,
    SERVED_NAME,
    Shape,
    System,
    Tell,
)
from cluster.serve import make_launcher, running

NUM_BLOCKS = 4_096
"""Of 16 tokens: as much KV memory as the peer is given, 1 GiB a worker."""


def config(checkpoint: Path, shape: Shape) -> ClusterConfig:
    engine = EngineConfig(
        num_blocks=NUM_BLOCKS, max_num_seqs=MAX_NUM_SEQS, num_threads=1, prefix_cache=False
    )
    if shape == "1P+1D":
        pools: tuple[PoolConfig, ...] = (
            PoolConfig(name="prefill", role="prefill", engine=engine),
            PoolConfig(name="decode", role="decode", engine=engine),
        )
    else:
        pools = (PoolConfig(name="mixed", role="mixed", replicas=2, engine=engine),)
    return ClusterConfig(
        version=1,
        model=ModelConfig(
            path=str(checkpoint),
            dtype="float32",
            max_model_len=MAX_MODEL_LEN,
            served_name=SERVED_NAME,
        ),
        pools=pools,
        router=RouterConfig(grpc_port=0, http_port=0),
    )


async def serve_baton(
    checkpoint: Path,
    shape: Shape,
    cores: tuple[int, ...],
    logs: Path,
    stack: contextlib.AsyncExitStack,
    tell: Tell,
) -> System:
    """Up and ready, each worker with all its threads on its core; ends with ``stack``."""
    wanted = config(checkpoint, shape)
    folder = logs / f"{OURS}-{shape}".replace(" ", "-")
    folder.mkdir()

    def told(line: str) -> None:
        tell(f"{OURS} {shape}: {line}")

    controller = await stack.enter_async_context(
        running(wanted, make_launcher(wanted, "process", None, folder), told)
    )
    workers = sorted(controller.workers, key=lambda worker: worker.worker_id, reverse=True)
    for worker, core in zip(workers, cores, strict=True):
        _bind(worker.pid, core)
    router = controller.router
    port = int(router.http_address.rpartition(":")[2])
    return System(
        OURS, "", shape, port, (router.pid, *(w.pid for w in workers)), router.grpc_address
    )


def _bind(pid: int, core: int) -> None:
    """Threads that start later take it from the one that starts them."""
    for thread in psutil.Process(pid).threads():
        os.sched_setaffinity(thread.id, {core})
