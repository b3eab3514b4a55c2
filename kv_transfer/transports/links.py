"""What transports with a listening socket of their own share."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable

from kv_transfer.transports.contract import MAX_HEAD_BYTES

log = logging.getLogger(__name__)

READ_BYTES = 64 * 2**10
_ACCEPT_PAUSE_S = 0.1


class BrokenFormat(Exception):
    """The other side is not one of ours."""


class RecordStream:
    """Reads from a connected, non-blocking socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._read = bytearray()

    async def read(self, num_bytes: int) -> bytes:
        """Exactly so many. Raises EOFError."""
        loop = asyncio.get_running_loop()
        while len(self._read) < num_bytes:
            data = await loop.sock_recv(self._socket, READ_BYTES)
            if not data:
                raise EOFError
            self._read += data
        taken = bytes(memoryview(self._read)[:num_bytes])
        del self._read[:num_bytes]
        return taken


class Door:
    """Where senders come in. ``serve`` has each connection (non-blocking) until it returns; what
    it raises costs that one its link, and is counted."""

    def __init__(
        self,
        listener: socket.socket,
        name: str,
        max_peers: int,
        serve: Callable[[socket.socket], Awaitable[None]],
    ) -> None:
        self.num_peers = 0
        self.num_dropped = 0
        self._listener = listener
        self._name = name
        self._max_peers = max_peers
        self._serve = serve

    async def run(self) -> None:
        """Until cancelled, then close."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    try:
                        sock, _ = await loop.sock_accept(self._listener)
                    except OSError as exc:  # No descriptors left, say: they may come back.
                        self._drop(f"could not accept: {exc}")
                        await asyncio.sleep(_ACCEPT_PAUSE_S)
                        continue
                    self.num_peers += 1
                    group.create_task(self._let_in(sock), name=f"KV by {self._name}")
        finally:
            self.close()

    async def _let_in(self, sock: socket.socket) -> None:
        try:
            sock.setblocking(False)
            if self.num_peers > self._max_peers:
                raise BrokenFormat(f"{self._max_peers} peers are connected")
            await self._serve(sock)
        except EOFError:
            pass  # The sender has closed, or is dead.
        except (OSError, RuntimeError, TimeoutError, BrokenFormat) as exc:
            self._drop(str(exc) or type(exc).__name__)
        finally:
            sock.close()
            self.num_peers -= 1

    def close(self) -> None:
        self._listener.close()

    def _drop(self, what: str) -> None:
        self.num_dropped += 1
        if self.num_dropped & (self.num_dropped - 1) == 0:
            log.warning("%s dropped a sender: %s (%d)", self._name, what, self.num_dropped)


async def read_head(stream: RecordStream, num_bytes: int) -> memoryview:
    """Raises BrokenFormat before any of a head that is too large is read."""
    if num_bytes > MAX_HEAD_BYTES:
        raise BrokenFormat(f"a head of {num_bytes} bytes; at most {MAX_HEAD_BYTES}")
    return memoryview(await stream.read(num_bytes))
