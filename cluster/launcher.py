"""What the controller needs of whatever starts processes: Ray, or plain child processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from baton.protocol.spec import RouterInfo, RouterSpec, RouterStatus, WorkerInfo, WorkerSpec

Loaded = Callable[[int, int], None]
"""(bytes of weights loaded, bytes in all), as far as is known; called on the event loop."""


class WorkerHandle(Protocol):
    """One incarnation of one worker, started and serving."""

    @property
    def info(self) -> WorkerInfo: ...

    async def wait(self) -> str:
        """Until the process has ended for whatever reason; says why. Never raises."""
        ...

    async def stop(self) -> None:
        """End it, gently first. Idempotent; the process is gone afterwards."""
        ...


class RouterHandle(Protocol):
    @property
    def info(self) -> RouterInfo: ...

    async def announce(self, info: WorkerInfo) -> None: ...

    async def worker_gone(self, worker_id: str, incarnation: str) -> None: ...

    async def status(self) -> RouterStatus: ...

    async def wait(self) -> str: ...

    async def stop(self, drain_s: float) -> None: ...


class Launcher(Protocol):
    """An async context manager; leaving it leaves no process behind."""

    async def __aenter__(self) -> Launcher: ...

    async def __aexit__(self, *exc: object) -> None: ...

    async def start_worker(self, spec: WorkerSpec, loaded: Loaded) -> WorkerHandle:
        """Raises ConfigError and other BatonErrors that starting the worker raised."""
        ...

    async def start_router(self, spec: RouterSpec) -> RouterHandle: ...
