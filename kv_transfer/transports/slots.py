"""A ring of slots that both ends of one link can reach, and the Unix socket that speaks of it.

What the slots lie in (``shared_memory``, ``cuda_ipc``) is a ring's affair. The sender makes one
for each link and offers it over the socket. A slot is the sender's until the head that names it
was sent, then the receiver's until it gives it back.

Nearness is proved, not guessed: a receiver listens under a random name that exists in the kernel
only (an abstract socket), so reaching it means the same kernel and network namespace, and both
ends ask the kernel for the other's user, which must be their own.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import struct
from collections.abc import Callable
from typing import Protocol

from baton.messaging.turns import Turns
from baton.protocol.errors import ConfigError
from baton.protocol.messages import KvOffer
from kv_transfer.transports.contract import (
    CONNECT_DEADLINE_S,
    QUEUE_FRAMES,
    LinkLost,
    OnPart,
)
from kv_transfer.transports.links import (
    READ_BYTES,
    BrokenFormat,
    Door,
    RecordStream,
    read_head,
)

MAX_PEERS = 256
NO_SLOT = -1
WELCOME = b"\x01"

# Little-endian. Behind the ring's own hello, sender to receiver, each with its head behind it:
PART = struct.Struct("<IiQ")  # bytes of the head, slot or NO_SLOT, bytes of the payload
# and receiver to sender:
RELEASE = struct.Struct("<I")  # a slot that is the sender's again


class SenderRing(Protocol):
    """QUEUE_FRAMES slots, made by ``offer``. Raises OSError."""

    slot_bytes: int

    def offer(self, sock: socket.socket) -> None:
        """Make the ring and send what the receiver must know, in one message."""
        ...

    def room(self, slot: int, num_bytes: int) -> memoryview: ...

    def owns(self, payload: memoryview) -> bool:
        """Whether it is memory of ``room``."""
        ...

    def publish(self, slot: int, num_bytes: int) -> None:
        """What is in ``room`` is complete: let the receiver find it."""
        ...

    def close(self, sock: socket.socket) -> None:
        """Takes the socket over, and closes it."""
        ...


class ReceiverRing(Protocol):
    def slot(self, slot: int, num_bytes: int) -> memoryview:
        """Valid until the next call. Raises BrokenFormat for a slot that is not there."""
        ...

    def close(self) -> None: ...


TakeRing = Callable[[socket.socket], ReceiverRing]
"""Reads a ring's hello off a readable socket. Raises OSError or BrokenFormat."""


class SlotSender:
    def __init__(self, kind: str, ring: SenderRing) -> None:
        self.kind = kind
        self.num_bytes = 0
        self.window_bytes = QUEUE_FRAMES * ring.slot_bytes
        self._ring = ring
        self._socket: socket.socket | None = None
        # A stack: the slot that was read last is warm in the caches.
        self._free = list(range(QUEUE_FRAMES))
        self._held: int | None = None
        self._sent: set[int] = set()
        self._released = bytearray()
        self._changed = asyncio.Event()
        self._why_lost = "connect comes first"

    async def connect(self, offer: KvOffer) -> None:
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        has_ring = False
        try:
            async with asyncio.timeout(CONNECT_DEADLINE_S):
                await loop.sock_connect(sock, abstract(offer.address))
                check_user(sock)
                has_ring = True
                self._ring.offer(sock)
                if await loop.sock_recv(sock, len(WELCOME)) != WELCOME:
                    raise OSError("the receiver refused the ring")
        except (OSError, TimeoutError) as exc:
            self._give_up(sock, has_ring)
            why = str(exc) or type(exc).__name__
            raise LinkLost(f"no {self.kind} with {offer.address}: {why}") from exc
        except BaseException:
            self._give_up(sock, has_ring)
            raise
        self._socket = sock
        loop.add_reader(sock, self._on_readable)

    def _give_up(self, sock: socket.socket, has_ring: bool) -> None:
        if has_ring:
            self._ring.close(sock)
        else:
            sock.close()

    async def room(self, num_bytes: int) -> memoryview:
        return self._ring.room(await self._slot(num_bytes), num_bytes)

    async def _slot(self, num_bytes: int) -> int:
        """The slot that the next payload goes into."""
        slot_bytes = self._ring.slot_bytes
        assert num_bytes <= slot_bytes, f"{num_bytes} bytes in slots of {slot_bytes}"
        while self._held is None:
            self._check_open()
            if self._free:
                self._held = self._free.pop()
            else:
                self._changed.clear()
                await self._changed.wait()
        self._check_open()
        return self._held

    async def send(self, head: bytes, payload: memoryview | None) -> None:
        slot, num_bytes = NO_SLOT, 0
        if payload is not None:
            num_bytes = payload.nbytes
            slot = await self._slot(num_bytes)
            if not self._ring.owns(payload):
                self._ring.room(slot, num_bytes)[:] = payload.cast("B")
            try:
                self._ring.publish(slot, num_bytes)
            except OSError as exc:
                self._end(f"the ring broke: {exc}")
            self._held = None
            self._sent.add(slot)
        await self._write(PART.pack(len(head), slot, num_bytes) + head)
        self.num_bytes += num_bytes

    async def _write(self, data: bytes) -> None:
        """A cut record would shift all that follow: the link is lost with it."""
        self._check_open()
        assert self._socket is not None
        try:
            await asyncio.get_running_loop().sock_sendall(self._socket, data)
        except OSError as exc:
            self._end(f"the receiver is gone: {exc}")
        except BaseException:
            self._end("a send was broken off")
            raise
        self._check_open()

    def _check_open(self) -> None:
        if self._socket is None:
            raise LinkLost(self._why_lost)

    def _on_readable(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError as exc:
            self._end(f"the receiver is gone: {exc}")
            return
        if not data:
            self._end("the receiver is gone")
            return
        self._released += data
        while len(self._released) >= RELEASE.size:
            (slot,) = RELEASE.unpack_from(self._released)
            del self._released[: RELEASE.size]
            if slot not in self._sent:
                self._end(f"the receiver gave back slot {slot}, which it did not have")
                return
            self._sent.remove(slot)
            self._free.append(slot)
        self._changed.set()

    def close(self) -> None:
        self._end("closed")

    def _end(self, why: str) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._ring.close(self._socket)
            self._socket = None
            self._why_lost = why
        self._changed.set()


class SlotReceiver:
    def __init__(self, kind: str, take_ring: TakeRing, on_part: OnPart) -> None:
        self.kind = kind
        self.num_bytes = 0
        self._take_ring = take_ring
        self._on_part = on_part
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._door = Door(self._listener, kind, MAX_PEERS, self._serve)

    @property
    def num_dropped(self) -> int:
        return self._door.num_dropped

    @property
    def num_peers(self) -> int:
        return self._door.num_peers

    def bind(self, host: str) -> KvOffer:
        """``host`` plays no part: nobody else's can reach it."""
        name = f"baton-kv-{secrets.token_hex(16)}"
        try:
            self._listener.bind(abstract(name))
            self._listener.listen(MAX_PEERS)
        except OSError as exc:
            raise ConfigError(
                f"cannot listen for {self.kind}: {exc}; set kv_transfer.transport: zeromq"
            ) from exc
        return KvOffer(self.kind, name)

    async def run(self) -> None:
        await self._door.run()

    def close(self) -> None:
        self._door.close()

    async def _serve(self, sock: socket.socket) -> None:
        async with asyncio.timeout(CONNECT_DEADLINE_S):
            check_user(sock)
            await _readable(sock)
            ring = self._take_ring(sock)
        try:
            await asyncio.get_running_loop().sock_sendall(sock, WELCOME)
            await self._receive(RecordStream(sock), sock, ring)
        finally:
            ring.close()

    async def _receive(self, stream: RecordStream, sock: socket.socket, ring: ReceiverRing) -> None:
        turns = Turns()
        while True:
            head_bytes, slot, num_bytes = PART.unpack(await stream.read(PART.size))
            payload = None if slot == NO_SLOT else ring.slot(slot, num_bytes)
            if payload is None and num_bytes:
                raise BrokenFormat(f"{num_bytes} bytes in no slot")
            head = await read_head(stream, head_bytes)
            self.num_bytes += num_bytes
            await self._on_part(head, payload)
            if payload is not None:
                # A few bytes that the sender waits for: no room for them means that it is gone.
                sock.send(RELEASE.pack(slot))
            await turns.take()


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)


def abstract(name: str) -> str:
    return f"\0{name}"


def check_user(sock: socket.socket) -> None:
    """Raises PermissionError when the other side is another user's process."""
    _, uid, _ = struct.unpack(
        "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    if uid != os.geteuid():
        raise PermissionError(f"the other side is user {uid}, not {os.geteuid()}")
