"""``grpc.health.v1``: SERVING while at least one pair of workers can take a request."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from router.frontend import Frontend

SERVICE = "baton.v1.Baton"

WATCH_INTERVAL_S = 0.25
"""How stale a watcher's knowledge may be; ``Check`` is never stale."""


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Asks the front end each time: there is no second copy of the truth to go stale."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """NOT_SERVING from now on, for watchers at once; their calls then end."""
        self._stopping.set()

    async def Check(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> health_pb2.HealthCheckResponse:
        if not _knows(request.service):
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"no service {request.service[:80]!r} here"
            )
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        told: int | None = None
        while True:
            stopping = self._stopping.is_set()
            status = self._status(request.service)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            if stopping:
                return
            try:
                async with asyncio.timeout(WATCH_INTERVAL_S):
                    await self._stopping.wait()
            except TimeoutError:
                continue

    def _status(self, service: str) -> int:
        if not _knows(service):
            status = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        elif self._stopping.is_set() or self._frontend.ready() is not None:
            status = health_pb2.HealthCheckResponse.NOT_SERVING
        else:
            status = health_pb2.HealthCheckResponse.SERVING
        return int(status)


def _knows(service: str) -> bool:
    """The empty name asks for the server as a whole."""
    return service in ("", SERVICE)
