"""The gRPC port: the service, health and reflection, with caps on all that comes from outside."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton.protocol.config import RouterConfig
from baton.protocol.errors import ConfigError
from router.frontend import Frontend
from router.grpc_health import SERVICE, HealthServicer
from router.grpc_service import BatonServicer, handlers
from router.tokenizer import Tokenizer
from router.validation import Validator

MAX_MESSAGE_BYTES = 4 * 2**20
MAX_METADATA_BYTES = 16 * 2**10
MAX_CONNECTIONS = 1_024

SMALL_CALLS = 256
"""Calls beside the generating ones (health watchers, loads) that run at once."""

_HEALTH = "grpc.health.v1.Health"


class GrpcServer:
    """A plain service with start and stop; lives in the loop that started it."""

    def __init__(
        self,
        frontend: Frontend,
        validator: Validator,
        tokenizer: Tokenizer,
        config: RouterConfig,
        *,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self._frontend = frontend
        self._servicer = BatonServicer(frontend, validator, tokenizer)
        self._health = HealthServicer(frontend)
        self._config = config
        self._max_connections = max_connections
        self._server: grpc.aio.Server | None = None

    async def start(self) -> int:
        """Bind and serve; returns the port. Raises ConfigError when it cannot be bound."""
        max_calls = self._config.max_queued_requests + SMALL_CALLS
        server = grpc.aio.server(
            options=_options(max_calls, self._max_connections),
            maximum_concurrent_rpcs=max_calls,
        )
        server.add_generic_rpc_handlers((handlers(self._servicer),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE, _HEALTH, reflection.SERVICE_NAME), server)
        port = _bind(server, self._config.host, self._config.grpc_port)
        await server.start()
        self._server = server
        return port

    async def stop(self, grace_s: float) -> None:
        """Take nothing new, let running calls end within ``grace_s``, then cancel them.

        Idempotent. Cancelled calls abort their requests, as if their clients had gone.
        """
        server, self._server = self._server, None
        if server is None:
            return
        self._health.stop()
        await server.stop(grace_s)


def _bind(server: grpc.aio.Server, host: str, port: int) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        return server.add_insecure_port(address)
    except RuntimeError as exc:
        raise ConfigError(
            f"router.grpc_port: cannot listen on {address}; another process may hold the port. "
            "Choose another, or 0 for a free one",
            param="router.grpc_port",
            hop="router",
        ) from exc


def _options(max_calls: int, max_connections: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.max_concurrent_streams", max_calls),
        ("grpc.max_allowed_incoming_connections", max_connections),
        # A second router on the same port must fail, not take half of the calls.
        ("grpc.so_reuseport", 0),
        # A client that vanished without a word is noticed, and its requests aborted.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # Clients may ping every 10 s, also without a call.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
