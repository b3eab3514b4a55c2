"""What is measured: clusters started from config files, or one that runs already."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from baton.protocol.config import ClusterConfig
from cluster.load import load_config
from cluster.serve import make_launcher, running


@dataclass(frozen=True, slots=True)
class Deployment:
    """``pids`` and ``config`` are unknown for one that somebody else runs."""

    name: str
    address: str
    pids: tuple[int, ...] = ()
    config: ClusterConfig | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    name: str
    config: ClusterConfig


def plan_deployments(paths: Sequence[Path]) -> list[Planned]:
    """Raises ConfigErrors. Names say the workers: ``1P+1D``, ``2M`` for two mixed ones."""
    configs = [load_config(path) for path in paths]
    names = [workers(config) for config in configs]
    times = Counter(names)
    return [
        Planned(name if times[name] == 1 else f"{name} {path.stem}", _on_free_ports(config))
        for name, path, config in zip(names, paths, configs, strict=True)
    ]


def workers(config: ClusterConfig) -> str:
    num: Counter[str] = Counter()
    for pool in config.pools:
        num[pool.role] += pool.num_replicas
    letters = {"prefill": "P", "decode": "D", "mixed": "M"}
    return "+".join(f"{num[role]}{letter}" for role, letter in letters.items() if num[role])


def num_threads(config: ClusterConfig) -> int:
    """Compute threads of all workers together: what two deployments must have alike."""
    return sum(pool.num_replicas * pool.engine.num_threads for pool in config.pools)


@contextlib.asynccontextmanager
async def started(
    planned: Sequence[Planned], log_dir: Path, tell: Callable[[str], None]
) -> AsyncIterator[list[Deployment]]:
    """All of them up at once, as bare processes; all of them gone afterwards."""
    async with contextlib.AsyncExitStack() as stack:
        found = []
        for number, plan in enumerate(planned):
            folder = log_dir / str(number)
            folder.mkdir()
            launcher = make_launcher(plan.config, "process", None, folder)

            def told(line: str, name: str = plan.name) -> None:
                tell(f"{name}: {line}")

            controller = await stack.enter_async_context(running(plan.config, launcher, told))
            pids = (controller.router.pid, *(worker.pid for worker in controller.workers))
            found.append(Deployment(plan.name, controller.router.grpc_address, pids, plan.config))
        yield found


def _on_free_ports(config: ClusterConfig) -> ClusterConfig:
    router = msgspec.structs.replace(config.router, grpc_port=0, http_port=0)
    return msgspec.structs.replace(config, router=router)
