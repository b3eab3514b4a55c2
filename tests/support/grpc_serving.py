"""A gRPC server over a scripted front end: in the test's own loop, or in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import msgspec

from baton.protocol.config import RouterConfig
from router.grpc_server import GrpcServer
from router.validation import Validator
from tests.support.scripted_frontend import ScriptedFrontend
from tests.support.tiny_text import tiny_template, tiny_tokenizer

CONFIG = RouterConfig(grpc_port=0, default_timeout_s=30.0, max_timeout_s=60.0)


def new_server(
    frontend: ScriptedFrontend, config: RouterConfig = CONFIG, **options: int
) -> GrpcServer:
    tokenizer = tiny_tokenizer()
    validator = Validator(frontend.model, tokenizer, tiny_template(), config)
    return GrpcServer(frontend, validator, tokenizer, config, **options)


@asynccontextmanager
async def serving(
    frontend: ScriptedFrontend, config: RouterConfig = CONFIG, **options: int
) -> AsyncIterator[str]:
    """Yields the address; afterwards nothing runs in the front end."""
    server = new_server(frontend, config, **options)
    port = await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace_s=0)
    async with asyncio.timeout(10):
        await frontend.until(lambda fe: not fe.running)


@dataclass(frozen=True)
class ThreadedServer:
    address: str
    frontend: ScriptedFrontend
    loop: asyncio.AbstractEventLoop

    def until(self, condition: Callable[[ScriptedFrontend], bool]) -> None:
        """Blocks until the front end is in that state, at most 10 s."""
        waiting = asyncio.wait_for(self.frontend.until(condition), 10)
        asyncio.run_coroutine_threadsafe(waiting, self.loop).result()


@contextmanager
def serving_in_thread(
    frontend: ScriptedFrontend, config: RouterConfig = CONFIG
) -> Iterator[ThreadedServer]:
    """For the blocking client."""
    started: list[ThreadedServer] = []
    ready, done = threading.Event(), asyncio.Event()

    async def run() -> None:
        async with serving(frontend, config) as address:
            started.append(ThreadedServer(address, frontend, asyncio.get_running_loop()))
            ready.set()
            await done.wait()

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="grpc-server")
    thread.start()
    try:
        assert ready.wait(20), "the server did not start"
        yield started[0]
    finally:
        if started:
            started[0].loop.call_soon_threadsafe(done.set)
        thread.join(20)
    assert not thread.is_alive()


def with_port(port: int) -> RouterConfig:
    return msgspec.structs.replace(CONFIG, grpc_port=port)
