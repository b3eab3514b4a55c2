"""A TCP port that forwards to another one and can be cut without a good-bye."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

ACCEPT_TURNS = 4
"""Of the event loop, within which what was accepted has become a connection that is known."""


class Relay:
    """``address`` is where clients connect."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closing = False
        self.address = ""

    def cut(self) -> None:
        """Reset every connection, on both sides."""
        for writer in self._writers:
            writer.transport.abort()

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Not a coroutine: whatever was accepted is known from here on, and ``close`` ends it."""
        if self._is_closing:
            writer.transport.abort()
            return
        task = asyncio.get_running_loop().create_task(self._carry(reader, writer))
        self._tasks.add(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            target_reader, target_writer = await asyncio.open_connection(*self._target.split(":"))
        except OSError:  # Nobody is there now: neither is this end.
            await hang_up(writer)
            return
        self._writers.add(target_writer)
        if writer.transport.is_closing():  # Cut before the target answered.
            target_writer.transport.abort()
        await asyncio.gather(_pump(reader, target_writer), _pump(target_reader, writer))

    async def close(self) -> None:
        self._is_closing = True
        while running := {task for task in self._tasks if not task.done()}:
            self.cut()
            await asyncio.wait(running, timeout=0.1)
        await asyncio.gather(*self._tasks)


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(65_536):
            sink.write(data)
    await hang_up(sink)


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """Close and wait for it, whatever the other side did."""
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


@contextlib.asynccontextmanager
async def relay_to(target: str) -> AsyncIterator[Relay]:
    relay = Relay(target)
    server = await asyncio.start_server(relay._accepted, "127.0.0.1", 0)
    relay.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield relay
    finally:
        # A server that closes forgets sockets which it accepted in the turn before: stop first.
        for listening in server.sockets:
            asyncio.get_running_loop().remove_reader(listening.fileno())
        for _ in range(ACCEPT_TURNS):
            await asyncio.sleep(0)
        server.close()
        await relay.close()
