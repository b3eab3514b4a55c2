"""The classes that become Ray actors: a few lines around a service, each in its own process.

Specs and infos cross as JSON bytes. Nothing on the request path goes through here.
"""

from __future__ import annotations

import msgspec
import ray

from baton.protocol.spec import RouterSpec, WorkerInfo, WorkerSpec
from cluster.instance import WorkerInstance
from router.service import RouterService

NODE_HOST = "node"


def _on_this_node(host: str) -> str:
    if host != NODE_HOST:
        return host
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


class WorkerActor:
    def __init__(self, spec: bytes) -> None:
        parsed = msgspec.json.decode(spec, type=WorkerSpec)
        host = _on_this_node(parsed.host)
        self._instance = WorkerInstance(msgspec.structs.replace(parsed, host=host))
        self._loaded: tuple[int, int] | None = None

    async def start(self) -> bytes:
        def note(done_bytes: int, total_bytes: int) -> None:
            self._loaded = (done_bytes, total_bytes)

        return msgspec.json.encode(await self._instance.start(note))

    async def loaded(self) -> tuple[int, int] | None:
        """(bytes of weights loaded, bytes in all), once that has begun."""
        return self._loaded

    async def wait(self) -> None:
        await self._instance.wait()

    async def stop(self) -> None:
        await self._instance.stop()


class RouterActor:
    def __init__(self, spec: bytes) -> None:
        self._spec = msgspec.json.decode(spec, type=RouterSpec)
        self._service: RouterService | None = None

    async def start(self) -> bytes:
        self._service = RouterService(self._spec)
        return msgspec.json.encode(await self._service.start())

    async def announce(self, info: bytes) -> None:
        self._running.announce(msgspec.json.decode(info, type=WorkerInfo))

    async def worker_gone(self, worker_id: str, incarnation: str) -> None:
        self._running.worker_gone(worker_id, incarnation)

    async def status(self) -> bytes:
        return msgspec.json.encode(self._running.status())

    async def wait(self) -> None:
        await self._running.wait()

    async def stop(self, drain_s: float = 0.0) -> None:
        if self._service is not None:
            await self._service.stop(drain_s)

    @property
    def _running(self) -> RouterService:
        assert self._service is not None, "start comes first"
        return self._service
