import asyncio

import pytest

from baton.protocol.config import ClusterConfig, ModelConfig, PoolConfig
from baton.protocol.spec import RouterInfo, RouterSpec, RouterStatus, WorkerInfo, WorkerSpec
from cluster import controller
from cluster.controller import Controller
from cluster.launcher import Loaded


class Handle:
    def __init__(self, info: object) -> None:
        self.info = info

    async def announce(self, info: WorkerInfo) -> None:
        pass

    async def status(self) -> RouterStatus:
        return RouterStatus(not_ready="")


class SlowLauncher:
    """Its worker loads a quarter, the rest once that was told, and is up once that was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._told_of_loading = asyncio.Event()
        self._told_of_kernels = asyncio.Event()

    def tell(self, line: str) -> None:
        self.lines.append(line)
        if "of weights" in line:
            self._told_of_loading.set()
        if "kernels" in line:
            self._told_of_kernels.set()

    async def start_router(self, spec: RouterSpec) -> Handle:
        return Handle(RouterInfo(router_id="router-0", pid=1, grpc_address="", http_address=""))

    async def start_worker(self, spec: WorkerSpec, loaded: Loaded) -> Handle:
        loaded(4_000_000_000, 16_000_000_000)
        await self._told_of_loading.wait()
        loaded(16_000_000_000, 16_000_000_000)
        await self._told_of_kernels.wait()
        info = WorkerInfo(
            worker_id=spec.worker_id, incarnation="i", role="mixed", address="", pid=2
        )
        return Handle(info)


async def test_a_slow_start_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "STILL_LOADING_S", 0.01)
    launcher = SlowLauncher()
    config = ClusterConfig(
        version=1,
        model=ModelConfig(path="somewhere"),
        pools=(PoolConfig(name="m", role="mixed"),),
    )
    await Controller(config, launcher, launcher.tell).start()  # type: ignore[arg-type]
    assert "m-0 has 25% of 16.0 GB of weights" in launcher.lines
    assert "m-0 has 100% of 16.0 GB of weights and makes its kernels ready" in launcher.lines
    assert launcher.lines[-1] == "m-0 is up (pid 2)"
