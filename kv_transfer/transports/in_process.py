"""Both ends in one process, on one event loop or on two: payloads are handed over as they are.

Fencing: none needed. The receiver reads the sender's memory, which nobody writes again once it
was sent, and writes nothing of the sender's.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections import deque

from baton.messaging.turns import Turns
from baton.protocol.messages import KvOffer
from kv_transfer.transports.contract import QUEUE_FRAMES, LinkLost, OnPart

KIND = "in_process"

_receivers: dict[str, InProcessReceiver] = {}
"""By address. Setting, getting and removing one key is atomic, whichever thread does it."""


class InProcessSender:
    kind = KIND

    def __init__(self, max_frame_bytes: int) -> None:
        self.num_bytes = 0
        self.window_bytes = QUEUE_FRAMES * max_frame_bytes
        self._pipe: _Pipe | None = None

    async def connect(self, offer: KvOffer) -> None:
        receiver = _receivers.get(offer.address)
        if receiver is None:
            raise LinkLost(f"{offer.address} is not in this process")
        self._pipe = _Pipe(_Bell())
        receiver.attach(self._pipe)

    async def room(self, num_bytes: int) -> None:
        assert self._pipe is not None, "connect comes first"
        await self._pipe.room()

    async def send(self, head: bytes, payload: memoryview | None) -> None:
        assert self._pipe is not None, "connect comes first"
        await self._pipe.room()
        self._pipe.put(head, payload)
        if payload is not None:
            self.num_bytes += payload.nbytes

    def close(self) -> None:
        if self._pipe is not None:
            self._pipe.close()


class InProcessReceiver:
    kind = KIND

    def __init__(self, on_part: OnPart) -> None:
        self.num_bytes = 0
        self.num_dropped = 0
        self._on_part = on_part
        self._address = f"in-process-{secrets.token_hex(16)}"
        self._pipes: list[_Pipe] = []
        self._lock = threading.Lock()
        self._bell: _Bell | None = None
        self._is_closed = False

    def bind(self, host: str) -> KvOffer:
        _receivers[self._address] = self
        return KvOffer(KIND, self._address)

    def attach(self, pipe: _Pipe) -> None:
        """From any thread. Raises LinkLost."""
        with self._lock:
            if self._is_closed:
                raise LinkLost("the receiver has closed")
            self._pipes.append(pipe)
            if self._bell is not None:
                pipe.set_reader(self._bell)

    async def run(self) -> None:
        turns = Turns()
        with self._lock:
            bell = self._bell = _Bell()
            for pipe in self._pipes:
                pipe.set_reader(bell)
        try:
            while True:
                with self._lock:
                    self._pipes = [p for p in self._pipes if p.is_open]
                    pipes = tuple(self._pipes)
                parts = [(pipe, part) for pipe in pipes if (part := pipe.take()) is not None]
                if not parts:
                    await bell.wait()
                for pipe, (head, payload) in parts:
                    if payload is not None:
                        self.num_bytes += payload.nbytes
                    await self._on_part(memoryview(head), payload)
                    pipe.release()
                    await turns.take()
        finally:
            self.close()

    def close(self) -> None:
        _receivers.pop(self._address, None)
        with self._lock:
            self._is_closed = True
            pipes, self._pipes = self._pipes, []
        for pipe in pipes:
            pipe.close()


class _Bell:
    """Wakes the task that waits on it, from any thread. Made on that task's loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._rung = asyncio.Event()

    def ring(self) -> None:
        with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits.
            self._loop.call_soon_threadsafe(self._rung.set)

    async def wait(self) -> None:
        await self._rung.wait()
        self._rung.clear()


class _Pipe:
    """Parts of one sender that are on their way; each side calls from its own thread."""

    def __init__(self, writer: _Bell) -> None:
        self.is_open = True
        self._writer = writer
        self._reader: _Bell | None = None
        self._parts: deque[tuple[bytes, memoryview | None]] = deque()
        self._num_on_way = 0
        self._lock = threading.Lock()

    def set_reader(self, reader: _Bell) -> None:
        self._reader = reader
        reader.ring()

    async def room(self) -> None:
        while self.is_open and self._num_on_way >= QUEUE_FRAMES:
            await self._writer.wait()
        if not self.is_open:
            raise LinkLost("the in-process link is closed")

    def put(self, head: bytes, payload: memoryview | None) -> None:
        with self._lock:
            self._parts.append((head, payload))
            self._num_on_way += 1
        if self._reader is not None:
            self._reader.ring()

    def take(self) -> tuple[bytes, memoryview | None] | None:
        with self._lock:
            return self._parts.popleft() if self._parts else None

    def release(self) -> None:
        """The part that was taken is read."""
        with self._lock:
            self._num_on_way -= 1
        self._writer.ring()

    def close(self) -> None:
        with self._lock:
            self.is_open = False
            self._parts.clear()
        self._writer.ring()
        if self._reader is not None:
            self._reader.ring()
