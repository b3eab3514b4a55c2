"""torch.distributed point to point: gloo between CPUs, NCCL between GPUs, a group for each pair.

Heads go over a TCP connection, payloads through the group, and only after the receiver has said
over TCP that it is ready for that one: then a move that does not end in time means trouble, not
a slow reader. A thread joins the group and waits for it, another aborts it (``group_thread``).

Fencing: the sender has none of the receiver's memory. A payload lands in staging memory of its
link and counts when all of it came and its head was read on the same link. When the receiver
leaves a sender, it aborts the group and closes the connection: a sender that was stopped
meanwhile finds both gone, and its next link is a new group, under a new name in a new store.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.messaging.sockets import MAX_PART_BYTES
from baton.messaging.turns import Turns
from baton.protocol.errors import ConfigError
from baton.protocol.messages import KvOffer
from kv_transfer.transports.contract import (
    CONNECT_DEADLINE_S,
    LinkLost,
    OnPart,
)
from kv_transfer.transports.group_thread import GroupThread
from kv_transfer.transports.links import (
    READ_BYTES,
    BrokenFormat,
    Door,
    RecordStream,
    read_head,
)
from kv_transfer.transports.pair_group import (
    Backend,
    PairGroup,
    find_store,
    host_store,
    is_available,
)

GLOO: Backend = "gloo"
NCCL: Backend = "nccl"
MAX_PEERS = 64
NUM_STAGED = 2
NO_PAYLOAD = -1

# Everything on the connection, little-endian. First:
_HELLO = struct.Struct("<8s8s")  # magic, backend
_MAGIC = b"baton-p1"
_WELCOME = struct.Struct("<H16s")  # the store's port, the group's name
_JOINED = b"\x01"
# then, sender to receiver, each with its head behind it:
_PART = struct.Struct("<Iq")  # bytes of the head, bytes of the payload or NO_PAYLOAD
# and receiver to sender, for each payload:
_READY = b"\x02"


class TorchSender:
    def __init__(self, backend: Backend, max_frame_bytes: int) -> None:
        self.kind: str = backend
        self.num_bytes = 0
        # One more may be in the receiver's hands.
        self.window_bytes = (NUM_STAGED + 1) * max_frame_bytes
        self._backend = backend
        self._frame_bytes = max_frame_bytes
        self._socket: socket.socket | None = None
        self._thread: GroupThread | None = None
        self._free: list[_Staged] = []
        self._held: _Staged | None = None
        self._num_ready = 0
        self._changed = asyncio.Event()
        self._why_lost = "connect comes first"

    async def connect(self, offer: KvOffer) -> None:
        if not is_available(self._backend):
            raise LinkLost(f"{self._backend} is not available here")
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._thread = GroupThread()
        try:
            async with asyncio.timeout(CONNECT_DEADLINE_S):
                await self._join(sock, self._thread, offer.address)
        except (OSError, EOFError, ValueError, RuntimeError, TimeoutError, BrokenFormat) as exc:
            sock.close()
            self._end("not connected")
            why = str(exc) or type(exc).__name__
            raise LinkLost(f"no {self.kind} group with {offer.address}: {why}") from exc
        except BaseException:
            sock.close()
            self._end("not connected")
            raise
        self._socket = sock
        self._free = [_Staged.of(self._backend, self._frame_bytes) for _ in range(NUM_STAGED)]
        asyncio.get_running_loop().add_reader(sock, self._on_readable)

    async def _join(self, sock: socket.socket, thread: GroupThread, address: str) -> None:
        loop = asyncio.get_running_loop()
        host, _, port = address.rpartition(":")
        await loop.sock_connect(sock, (host, int(port)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.sock_sendall(sock, _HELLO.pack(_MAGIC, self._backend.encode()))
        stream = RecordStream(sock)
        store_port, name = _WELCOME.unpack(await stream.read(_WELCOME.size))
        own_host = sock.getsockname()[0]

        def make() -> PairGroup:
            return PairGroup(self._backend, find_store(host, store_port), name.hex(), 0, own_host)

        await thread.join(make)
        if await stream.read(1) != _JOINED:
            raise BrokenFormat("the receiver did not join")

    async def room(self, num_bytes: int) -> memoryview:
        return (await self._stage(num_bytes)).view[:num_bytes]

    async def _stage(self, num_bytes: int) -> _Staged:
        assert num_bytes <= self._frame_bytes, f"{num_bytes} bytes, at most {self._frame_bytes}"
        while self._held is None:
            self._check_open()
            if self._free:
                self._held = self._free.pop()
            else:
                await self._change()
        self._check_open()
        return self._held

    async def send(self, head: bytes, payload: memoryview | None) -> None:
        num_bytes = NO_PAYLOAD if payload is None else payload.nbytes
        staged = None
        if payload is not None:
            staged = await self._stage(payload.nbytes)
            if payload.obj is not staged.view.obj:
                staged.view[: payload.nbytes] = payload.cast("B")
        await self._write(_PART.pack(len(head), num_bytes) + head)
        if staged is None:
            return
        while not self._num_ready:
            self._check_open()
            await self._change()
        self._check_open()
        assert self._thread is not None
        self._num_ready -= 1
        self._held = None
        self.num_bytes += num_bytes
        if num_bytes:
            self._thread.send(staged.tensor[:num_bytes]).add_done_callback(
                lambda done: self._moved(staged, done)
            )
        else:
            self._free.append(staged)

    def _moved(self, staged: _Staged, done: asyncio.Future[None]) -> None:
        if done.cancelled() or (exc := done.exception()) is None:
            self._free.append(staged)
            self._changed.set()
        else:
            self._end(f"the {self.kind} group failed: {exc}")

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

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

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
        if not data or data.strip(_READY):
            self._end("the receiver is gone" if not data else "the receiver broke the format")
            return
        self._num_ready += len(data)
        self._changed.set()

    def close(self) -> None:
        self._end("closed")

    def _end(self, why: str) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
        if self._thread is not None:
            self._thread.close()
            self._thread = None
            self._why_lost = why
        self._changed.set()


class TorchReceiver:
    def __init__(self, backend: Backend, on_part: OnPart) -> None:
        """Raises ConfigError where this machine or this torch has no such backend."""
        if not is_available(backend):
            raise ConfigError(
                f"kv_transfer.transport: {backend} is not available on this worker; "
                "set it to auto or to zeromq"
            )
        self.kind: str = backend
        self.num_bytes = 0
        self._backend = backend
        self._on_part = on_part
        self._host = ""
        self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._door = Door(self._listener, self.kind, MAX_PEERS, self._serve)

    @property
    def num_dropped(self) -> int:
        return self._door.num_dropped

    @property
    def num_peers(self) -> int:
        return self._door.num_peers

    def bind(self, host: str) -> KvOffer:
        try:
            self._listener.bind((host, 0))
            self._listener.listen(MAX_PEERS)
        except OSError as exc:
            raise ConfigError(f"cannot listen on {host} for {self.kind}: {exc}") from exc
        self._host, port = self._listener.getsockname()
        return KvOffer(self.kind, f"{self._host}:{port}")

    async def run(self) -> None:
        await self._door.run()

    def close(self) -> None:
        self._door.close()

    async def _serve(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream, thread = RecordStream(sock), GroupThread()
        try:
            async with asyncio.timeout(CONNECT_DEADLINE_S):
                await self._join(sock, stream, thread)
            await self._receive(sock, stream, thread)
        finally:
            thread.close()

    async def _join(self, sock: socket.socket, stream: RecordStream, thread: GroupThread) -> None:
        loop = asyncio.get_running_loop()
        magic, backend = _HELLO.unpack(await stream.read(_HELLO.size))
        if magic != _MAGIC or backend.rstrip(b"\0") != self._backend.encode():
            raise BrokenFormat(f"a hello of another version or backend: {magic!r} {backend!r}")
        store, port = await thread.call(lambda: host_store(self._host))
        name = secrets.token_bytes(16)
        await loop.sock_sendall(sock, _WELCOME.pack(port, name))
        await thread.join(lambda: PairGroup(self._backend, store, name.hex(), 1, self._host))
        await loop.sock_sendall(sock, _JOINED)

    async def _receive(
        self, sock: socket.socket, stream: RecordStream, thread: GroupThread
    ) -> None:
        turns, staged = Turns(), _Staged.of(self._backend, 0)
        while True:
            head_bytes, num_bytes = _PART.unpack(await stream.read(_PART.size))
            if not NO_PAYLOAD <= num_bytes <= MAX_PART_BYTES:
                raise BrokenFormat(f"a payload of {num_bytes} bytes; at most {MAX_PART_BYTES}")
            head = await read_head(stream, head_bytes)
            payload = None
            if num_bytes != NO_PAYLOAD:
                if num_bytes > len(staged.tensor):
                    staged = _Staged.of(self._backend, num_bytes)
                sock.send(_READY)  # One byte that the sender waits for.
                if num_bytes:
                    await thread.receive(staged.tensor[:num_bytes])
                self.num_bytes += num_bytes
                payload = staged.view[:num_bytes].toreadonly()
            await self._on_part(head, payload)
            await turns.take()


@dataclass(frozen=True, slots=True)
class _Staged:
    """Host memory; page-locked where it is copied to and from a GPU."""

    tensor: Tensor
    view: memoryview

    @classmethod
    def of(cls, backend: Backend, num_bytes: int) -> _Staged:
        tensor = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=backend == NCCL)
        return cls(tensor, tensor.numpy().data)
