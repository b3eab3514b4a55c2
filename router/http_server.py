"""The HTTP port: OpenAI-compatible API, health, readiness, metrics and version.

It runs inside the router's event loop and installs no signal handlers: who starts it
stops it.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import socket

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from baton.protocol.config import RouterConfig
from baton.protocol.errors import ConfigError, Unavailable
from router import metrics
from router.frontend import Frontend
from router.http_endpoint import endpoint
from router.http_errors import MethodNotAllowed, NoSuchRoute, error_response
from router.limits import MAX_CONNECTIONS
from router.metrics import MeteredFrontend, RouterMetrics
from router.openai_server import OpenAiServer
from router.tokenizer import Tokenizer
from router.validation import Validator

_BACKLOG = 1_024


class HttpServer:
    """``start`` once, then ``stop`` once."""

    def __init__(
        self,
        frontend: Frontend,
        validator: Validator,
        tokenizer: Tokenizer,
        config: RouterConfig,
        router_metrics: RouterMetrics | None = None,
    ) -> None:
        """``router_metrics``: of a ``MeteredFrontend`` that the gRPC server shares; without
        them the requests of this server alone are counted.
        """
        if router_metrics is None:
            router_metrics = RouterMetrics(frontend)
            frontend = MeteredFrontend(frontend, router_metrics)
        self._frontend = frontend
        self._config = config
        self._metrics = router_metrics
        openai = OpenAiServer(frontend, validator, tokenizer)
        app = Starlette(
            routes=[*openai.routes(), *self._own_routes()],
            exception_handlers={HTTPException: _http_exception},
        )
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                proxy_headers=False,
                limit_concurrency=MAX_CONNECTIONS,
            )
        )

    async def start(self) -> int:
        """The port that is bound. Raises ConfigError when it cannot be."""
        listener = _listen(self._config.host, self._config.http_port)
        port: int = listener.getsockname()[1]
        # Server.serve would take over the process's signals and tick in a task of its own.
        self._server.config.load()
        self._server.lifespan = self._server.config.lifespan_class(self._server.config)
        await self._server.startup(sockets=[listener])
        return port

    async def stop(self, grace_s: float = 5.0) -> None:
        """Take no new connections; running answers get ``grace_s``, then they are aborted."""
        if not self._server.started:
            return
        state = self._server.server_state
        tasks = set(state.tasks)
        try:
            async with asyncio.timeout(grace_s):
                await self._server.shutdown()
        except TimeoutError:
            # Each answer notices that its client is gone and aborts its requests.
            for connection in list(state.connections):
                connection.transport.abort()
        await asyncio.gather(*tasks, *state.tasks, return_exceptions=True)

    def _own_routes(self) -> list[Route]:
        return [
            Route("/health", endpoint(self._health), methods=["GET"]),
            Route("/ready", endpoint(self._ready), methods=["GET"]),
            Route("/metrics", endpoint(self._scrape), methods=["GET"]),
            Route("/version", endpoint(self._version), methods=["GET"]),
        ]

    async def _health(self, request: Request) -> Response:
        """The process lives and its loop turns. Whether it can serve: /ready."""
        return _json({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        reason = self._frontend.ready()
        if reason is not None:
            raise Unavailable(f"not ready: {reason}", hop="router")
        return _json({"status": "ready"})

    async def _scrape(self, request: Request) -> Response:
        return Response(self._metrics.exposition(), headers={"content-type": metrics.CONTENT_TYPE})

    async def _version(self, request: Request) -> Response:
        return _json({"version": version()})


def version() -> str:
    try:
        return importlib.metadata.version("baton-serve")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (run from a source tree)"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as exc:
        raise ConfigError(
            f"cannot listen for HTTP on {host} port {port}: {exc.strerror}. Stop the process that "
            "has the port, or set router.http_port to another one (0 takes a free one)",
            hop="router",
            param="router.http_port",
        ) from exc


async def _http_exception(request: Request, exc: Exception) -> Response:
    """Routing failures in the same shape as all other errors."""
    assert isinstance(exc, HTTPException)
    if exc.status_code == 405:
        allowed = (exc.headers or {}).get("Allow", "")
        error = MethodNotAllowed(
            f"{request.method} {request.url.path}: method not allowed; allowed: {allowed}"
        )
        response = error_response(error)
        response.headers["allow"] = allowed
        return response
    return error_response(
        NoSuchRoute(
            f"{request.url.path[:200]} does not exist; allowed: /v1/models, /v1/completions, "
            "/v1/chat/completions, /health, /ready, /metrics, /version"
        )
    )


def _json(value: dict[str, str]) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
