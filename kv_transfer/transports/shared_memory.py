"""One machine: payloads lie in memory that both processes map, heads go over a Unix socket.

The sender makes a ring of QUEUE_FRAMES slots for this one link, an anonymous file (memfd) that
has no name anywhere, and passes its descriptor. Whoever dies, however, the kernel frees it with
the last process that maps it. A slot is the sender's until the head that names it was sent, then
the receiver's until it says so; the receiver reads in place.

Fencing: a sender has its own ring mapped and nothing else. What a sender writes whose epoch is
dead, or whom the receiver has left, lands where nobody reads: slots are never given to another
sender, and KV blocks are written by their owner alone, after it allowed that very frame. The
file is sealed, so that a sender cannot shrink it under its reader.

Locality is proved, not guessed: a receiver listens under a random name that exists in the kernel
only (an abstract socket), so reaching it means the same kernel and network namespace, and both
ends ask the kernel for the other's user, which must be their own.
"""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import secrets
import socket
import struct
from dataclasses import dataclass

from baton.messaging.sockets import MAX_PART_BYTES
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

KIND = "shared_memory"
MAX_PEERS = 256
NO_SLOT = -1
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

# Everything on the socket, little-endian. First, with the ring's descriptor:
_HELLO = struct.Struct("<8sIIQ")  # magic, number of slots, 0, bytes of a slot
_MAGIC = b"baton-1\n"
_WELCOME = b"\x01"
# then, sender to receiver, each with its head behind it:
_PART = struct.Struct("<IiQ")  # bytes of the head, slot or NO_SLOT, bytes of the payload
# and receiver to sender:
_RELEASE = struct.Struct("<I")  # a slot that is the sender's again


class SharedMemorySender:
    kind = KIND

    def __init__(self, max_frame_bytes: int) -> None:
        self.num_bytes = 0
        self.window_bytes = QUEUE_FRAMES * max_frame_bytes
        self._slot_bytes = -(-max_frame_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._socket: socket.socket | None = None
        self._ring: mmap.mmap | None = None
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
        try:
            async with asyncio.timeout(CONNECT_DEADLINE_S):
                await loop.sock_connect(sock, _abstract(offer.address))
                _check_user(sock)
                ring = self._offer_ring(sock)
                if await loop.sock_recv(sock, len(_WELCOME)) != _WELCOME:
                    raise OSError("the receiver refused the ring")
        except (OSError, TimeoutError) as exc:
            sock.close()
            raise LinkLost(f"no shared memory with {offer.address}: {exc}") from exc
        except BaseException:
            sock.close()
            raise
        self._socket, self._ring = sock, ring
        loop.add_reader(sock, self._on_readable)

    def _offer_ring(self, sock: socket.socket) -> mmap.mmap:
        fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, QUEUE_FRAMES * self._slot_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            ring = mmap.mmap(fd, QUEUE_FRAMES * self._slot_bytes)
            hello = _HELLO.pack(_MAGIC, QUEUE_FRAMES, 0, self._slot_bytes)
            socket.send_fds(sock, [hello], [fd])
        finally:
            os.close(fd)
        return ring

    async def room(self, num_bytes: int) -> memoryview:
        assert num_bytes <= self._slot_bytes, f"{num_bytes} bytes in slots of {self._slot_bytes}"
        while self._held is None:
            if self._ring is None:
                raise LinkLost(self._why_lost)
            if self._free:
                self._held = self._free.pop()
                break
            self._changed.clear()
            await self._changed.wait()
        if self._ring is None:
            raise LinkLost(self._why_lost)
        start = self._held * self._slot_bytes
        return memoryview(self._ring)[start : start + num_bytes]

    async def send(self, head: bytes, payload: memoryview | None) -> None:
        slot, num_bytes = NO_SLOT, 0
        if payload is not None:
            num_bytes = payload.nbytes
            if self._held is None or payload.obj is not self._ring:
                (await self.room(num_bytes))[:] = payload.cast("B")
            assert self._held is not None
            slot, self._held = self._held, None
            self._sent.add(slot)
        await self._write(_PART.pack(len(head), slot, num_bytes) + head)
        self.num_bytes += num_bytes

    async def _write(self, data: bytes) -> None:
        """A cut record would shift all that follow: the link is lost with it."""
        sock = self._socket
        if sock is None:
            raise LinkLost(self._why_lost)
        try:
            await asyncio.get_running_loop().sock_sendall(sock, data)
        except OSError as exc:
            self._end(f"the receiver is gone: {exc}")
            raise LinkLost(self._why_lost) from exc
        except BaseException:
            self._end("a send was broken off")
            raise
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
        while len(self._released) >= _RELEASE.size:
            (slot,) = _RELEASE.unpack_from(self._released)
            del self._released[: _RELEASE.size]
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
            self._socket.close()
            self._socket = None
        # Unmapped with the last view of it: a frame may be on its way into a slot right now.
        self._ring = None
        self._why_lost = why
        self._changed.set()


class SharedMemoryReceiver:
    kind = KIND

    def __init__(self, on_part: OnPart) -> None:
        self.num_bytes = 0
        self._on_part = on_part
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._door = Door(self._listener, KIND, MAX_PEERS, self._serve)

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
            self._listener.bind(_abstract(name))
            self._listener.listen(MAX_PEERS)
        except OSError as exc:
            raise ConfigError(
                f"cannot listen for shared memory: {exc}; set kv_transfer.transport: zeromq"
            ) from exc
        return KvOffer(KIND, name)

    async def run(self) -> None:
        await self._door.run()

    def close(self) -> None:
        self._door.close()

    async def _serve(self, sock: socket.socket) -> None:
        async with asyncio.timeout(CONNECT_DEADLINE_S):
            _check_user(sock)
            ring = await _take_ring(sock)
            await asyncio.get_running_loop().sock_sendall(sock, _WELCOME)
        stream, turns = RecordStream(sock), Turns()
        while True:
            head_bytes, slot, num_bytes = _PART.unpack(await stream.read(_PART.size))
            payload = None if slot == NO_SLOT else ring.slot(slot, num_bytes)
            if payload is None and num_bytes:
                raise BrokenFormat(f"{num_bytes} bytes in no slot")
            head = await read_head(stream, head_bytes)
            self.num_bytes += num_bytes
            await self._on_part(head, payload)
            if payload is not None:
                # A few bytes that the sender waits for: no room for them means that it is gone.
                sock.send(_RELEASE.pack(slot))
            await turns.take()


@dataclass(frozen=True, slots=True)
class _Ring:
    memory: mmap.mmap
    num_slots: int
    slot_bytes: int

    def slot(self, slot: int, num_bytes: int) -> memoryview:
        if not 0 <= slot < self.num_slots or num_bytes > self.slot_bytes:
            raise BrokenFormat(f"{num_bytes} bytes in slot {slot} of a ring of {self.num_slots}")
        start = slot * self.slot_bytes
        return memoryview(self.memory)[start : start + num_bytes]


async def _take_ring(sock: socket.socket) -> _Ring:
    await _readable(sock)
    hello, fds, _, _ = socket.recv_fds(sock, _HELLO.size, 1)
    try:
        if len(hello) != _HELLO.size or len(fds) != 1:
            raise BrokenFormat(f"a hello of {len(hello)} bytes with {len(fds)} descriptors")
        magic, num_slots, _, slot_bytes = _HELLO.unpack(hello)
        if magic != _MAGIC:
            raise BrokenFormat(f"a hello of another version: {magic!r}")
        if not 0 < num_slots <= QUEUE_FRAMES or not 0 < slot_bytes <= MAX_PART_BYTES:
            raise BrokenFormat(f"a ring of {num_slots} slots of {slot_bytes} bytes")
        # Reading behind the end of a file that shrank would end this process.
        if fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise BrokenFormat("the ring's file is not sealed")
        if os.fstat(fds[0]).st_size != num_slots * slot_bytes:
            raise BrokenFormat("the ring's file has another size than the ring")
        memory = mmap.mmap(fds[0], num_slots * slot_bytes, prot=mmap.PROT_READ)
    finally:
        for fd in fds:
            os.close(fd)
    return _Ring(memory, num_slots, slot_bytes)


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)


def _abstract(name: str) -> str:
    return f"\0{name}"


def _check_user(sock: socket.socket) -> None:
    _, uid, _ = struct.unpack(
        "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    if uid != os.geteuid():
        raise PermissionError(f"the other side is user {uid}, not {os.geteuid()}")
