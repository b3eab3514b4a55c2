"""vLLM as 1 prefill + 1 decode worker over NIXL, or as two plain replicas, behind vllm-router.

Its own recipe: the KV connector reads from host memory through UCX over shared memory, each
worker computes on one core of its own, the router takes turns. In one point it is helped: the
connector moves every worker's computing thread to the last core of the machine, and this module
moves it back to its own.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from benchmarks.engine.variants import PLANS
from benchmarks.peer.processes import Command, free_ports, started, tree, until_healthy
from benchmarks.peer.systems import (
    HOST,
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    NUM_WORKERS,
    PEER,
    SERVED_NAME,
    Shape,
    System,
    Tell,
)

_ALONE = PLANS["vllm"].environment
assert _ALONE is not None
ENVIRONMENT = replace(
    _ALONE,
    bare=(
        ("nixl", "1.5.1"),
        ("nixl-cu12", "1.5.1"),
        ("vllm-router", "0.1.17"),
        ("orjson", "3.13.0"),
    ),
)
"""That of ``bench-engine``, and in it the KV transport and the router, without what they would
bring: the wheels of NIXL ask for CUDA, which the CPU build does not need."""

_WORKER_PROCESS = "VLLM::Worker"
_CONNECTOR = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}


@dataclass(frozen=True, slots=True)
class VllmPlan:
    """python: of its environment. preload: LD_PRELOAD, as its installation guide says, or "".
    cores: one of each worker. scratch: for caches."""

    python: Path
    checkpoint: Path
    preload: str
    cores: tuple[int, ...]
    scratch: Path
    logs: Path


async def serve_vllm(
    plan: VllmPlan, start: str, shape: Shape, stack: contextlib.AsyncExitStack, tell: Tell
) -> System:
    """Up and healthy; ends with ``stack``. Raises EngineFailed."""
    name = f"{PEER}-{start}-{shape}".replace(" ", "-")
    is_split = shape == "1P+1D"
    router_port, metrics_port, *ports = free_ports(2 + 2 * NUM_WORKERS)
    http, side = ports[:NUM_WORKERS], ports[NUM_WORKERS:]
    workers = [
        (
            Command(
                f"{name}-worker-{i}",
                _worker_arguments(plan, http[i], start, is_split=is_split),
                _worker_environment(plan, plan.cores[i], side[i]),
            ),
            http[i],
        )
        for i in range(NUM_WORKERS)
    ]
    roots = []
    running = []
    for command, port in workers:
        log = plan.logs / f"{command.name}.log"
        process = await stack.enter_async_context(started(command, log))
        running.append((process, command.name, port, log))
    for each in running:
        tell(f"{each[1]}: waiting until it is healthy")
        await until_healthy(*each)
        roots.append(each[0].pid)
    for root, core in zip(roots, plan.cores, strict=True):
        _bind_computing(root, core)
    router = Command(
        f"{name}-router", _router_arguments(plan, router_port, metrics_port, shape, http), {}
    )
    log = plan.logs / f"{router.name}.log"
    process = await stack.enter_async_context(started(router, log))
    await until_healthy(process, router.name, router_port, log)
    decode_port = http[1] if is_split else 0
    return System(PEER, start, shape, router_port, (*roots, process.pid), decode_port=decode_port)


def _bind_computing(root: int, core: int) -> None:
    """The main thread of the worker process is the one that computes; the connector's own threads
    stay where it put them."""
    for pid in tree([root]):
        if psutil.Process(pid).name() == _WORKER_PROCESS:
            os.sched_setaffinity(pid, {core})


def _worker_arguments(plan: VllmPlan, port: int, start: str, *, is_split: bool) -> tuple[str, ...]:
    options = {
        "model": str(plan.checkpoint),
        "served-model-name": SERVED_NAME,
        "host": HOST,
        "port": str(port),
        "dtype": "float32",
        "max-model-len": str(MAX_MODEL_LEN),
        "max-num-seqs": str(MAX_NUM_SEQS),
    }
    flags = ["--no-enable-prefix-caching"]
    if start == "eager":
        flags.append("--enforce-eager")
    if is_split:
        flags += ["--kv-transfer-config", json.dumps(_CONNECTOR)]
    said = [part for key, value in options.items() for part in (f"--{key}", value)]
    return (str(plan.python), "-m", "vllm.entrypoints.openai.api_server", *said, *flags)


def _worker_environment(plan: VllmPlan, core: int, side_port: int) -> Mapping[str, str]:
    found = {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": str(core),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_HOST_IP": HOST,
        "VLLM_NIXL_SIDE_CHANNEL_HOST": HOST,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_port),
        "UCX_TLS": "tcp,shm,self",
        "UCX_NET_DEVICES": "lo",
        "VLLM_CACHE_ROOT": str(plan.scratch / "vllm-cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return found | ({"LD_PRELOAD": plan.preload} if plan.preload else {})


def _router_arguments(
    plan: VllmPlan, port: int, metrics_port: int, shape: Shape, workers: list[int]
) -> tuple[str, ...]:
    urls = [f"http://{HOST}:{worker}" for worker in workers]
    if shape == "1P+1D":
        prefill, decode = urls
        behind = ["--vllm-pd-disaggregation", "--kv-connector", "nixl"]
        behind += ["--prefill", prefill, "--decode", decode]
    else:
        behind = ["--worker-urls", *urls]
    return (
        *(str(plan.python), "-m", "vllm_router.launch_router"),
        *("--host", HOST, "--port", str(port)),
        *("--prometheus-host", HOST, "--prometheus-port", str(metrics_port)),
        *("--policy", "round_robin"),
        *behind,
    )
