"""A running HTTP server over a scripted front end, and the ways to talk to it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import httpx
import msgspec
import openai

from baton.protocol.config import RouterConfig
from router.frontend import Frontend
from router.http_server import HttpServer
from router.metrics import RouterMetrics
from router.validation import Validator
from tests.support.tiny_text import tiny_template, tiny_tokenizer


def new_http_server(
    frontend: Frontend,
    config: RouterConfig | None = None,
    metrics: RouterMetrics | None = None,
) -> HttpServer:
    config = config or RouterConfig(http_port=0)
    tokenizer = tiny_tokenizer()
    validator = Validator(frontend.model, tokenizer, tiny_template(), config)
    return HttpServer(frontend, validator, tokenizer, config, metrics)


@asynccontextmanager
async def serving_http(frontend: Frontend, **config: object) -> AsyncGenerator[str, None]:
    """Yields the base URL."""
    server = new_http_server(frontend, msgspec.structs.replace(RouterConfig(http_port=0), **config))
    port = await server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await server.stop(grace_s=0)


@asynccontextmanager
async def openai_client(base_url: str) -> AsyncGenerator[openai.AsyncOpenAI, None]:
    """The real package, without its own retries: a test wants to see each answer."""
    async with openai.AsyncOpenAI(
        base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=30
    ) as client:
        yield client


@asynccontextmanager
async def plain_client(base_url: str) -> AsyncGenerator[httpx.AsyncClient, None]:
    async with httpx.AsyncClient(base_url=base_url, timeout=30) as client:
        yield client
