"""What only shared memory has: rings that nobody else's frames pass through, strangers on its
socket, and files without a name."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct

import pytest

from kv_transfer.transports import slots
from kv_transfer.transports.contract import LinkLost
from kv_transfer.transports.shared_memory import HELLO, MAGIC
from kv_transfer.transports.slots import PART, SlotReceiver
from tests.conformance.kv_ends import (
    FRAME_BYTES,
    Holdings,
    bound,
    linked,
    lost,
    nothing_left,
    put,
    receiver_of,
    running,
    until,
)

KIND = "shared_memory"
SLOT_BYTES = 64 * 1_024
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def memory(num_bytes: int, seals: int = SEALS) -> int:
    fd = os.memfd_create("stranger", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


async def greet(name: str, hello: bytes, *fds: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(f"\0{name}")
    sock.setblocking(False)
    socket.send_fds(sock, [hello], fds)
    for fd in fds:
        os.close(fd)
    return sock


async def answer(sock: socket.socket) -> bytes:
    """What the receiver says, or b"" when it has hung up."""
    async with asyncio.timeout(20.0):
        try:
            return await asyncio.get_running_loop().sock_recv(sock, 1)
        except ConnectionResetError:
            return b""


def good_hello(num_slots: int = 4, slot_bytes: int = SLOT_BYTES) -> bytes:
    return HELLO.pack(MAGIC, num_slots, 0, slot_bytes)


@pytest.mark.parametrize(
    ("hello", "fds"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", lambda: []),
        (good_hello(), lambda: []),
        (good_hello()[:-1], lambda: [memory(4 * SLOT_BYTES)]),
        (b"baton-0\n" + good_hello()[8:], lambda: [memory(4 * SLOT_BYTES)]),
        (good_hello(), lambda: [memory(4 * SLOT_BYTES, 0)]),
        (good_hello(), lambda: [memory(4 * SLOT_BYTES, fcntl.F_SEAL_GROW)]),
        (good_hello(), lambda: [memory(4 * SLOT_BYTES - 1)]),
        (good_hello(), lambda: [os.open("/dev/null", os.O_RDONLY)]),
        (good_hello(), lambda: [os.open(__file__, os.O_RDONLY)]),
        (good_hello(0), lambda: [memory(4 * SLOT_BYTES)]),
        (good_hello(2**31), lambda: [memory(4 * SLOT_BYTES)]),
        (good_hello(4, 0), lambda: [memory(4 * SLOT_BYTES)]),
        (good_hello(4, 2**40), lambda: [memory(2**42)]),
    ],
)
async def test_a_stranger_is_hung_up_on_at_its_hello(hello: bytes, fds: object) -> None:
    assert callable(fds)
    async with nothing_left(), linked(KIND) as (ends, sender):
        stranger = await greet(ends.offer.address, hello, *fds())
        assert await answer(stranger) == b""
        stranger.close()
        assert ends.receiver.num_dropped == 1
        await put(sender, b"good", b"unharmed")
        await ends.end(sender)


@pytest.mark.parametrize(
    "record",
    [
        PART.pack(0, 4, 1),  # No such slot.
        PART.pack(0, -2, 1),
        PART.pack(0, 0, SLOT_BYTES + 1),
        PART.pack(0, 0, 2**63),
        PART.pack(2**32 - 1, 0, 1),  # A head without end.
        PART.pack(0, -1, 1),  # A payload in no slot.
    ],
)
async def test_a_stranger_is_hung_up_on_at_a_broken_record(record: bytes) -> None:
    async with nothing_left(), linked(KIND) as (ends, sender):
        stranger = await greet(ends.offer.address, good_hello(), memory(4 * SLOT_BYTES))
        assert await answer(stranger) == b"\x01"
        stranger.send(record)
        assert await answer(stranger) == b""
        stranger.close()
        assert ends.receiver.num_dropped == 1
        await put(sender, b"good", b"unharmed")
        await ends.end(sender)
        assert ends.received.heads == [b"good", b"end"]


async def test_one_who_says_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "CONNECT_DEADLINE_S", 0.2)
    async with nothing_left(), linked(KIND) as (ends, sender):
        silent = socket.socket(socket.AF_UNIX)
        silent.connect(f"\0{ends.offer.address}")
        silent.setblocking(False)
        assert await answer(silent) == b""
        silent.close()
        await put(sender, b"good", b"unharmed")
        await ends.end(sender)


async def test_another_users_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nothing_left(), bound(KIND) as ends, running(ends.receiver.run()):
        own = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: own + 1)
        with pytest.raises(LinkLost, match=f"the other side is user {own}, not {own + 1}"):
            await ends.connect()


async def test_more_peers_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "MAX_PEERS", 2)
    async with nothing_left(), linked(KIND) as (ends, first):
        second = await ends.connect()
        with pytest.raises(LinkLost):
            await ends.connect()
        second.close()
        await until(lambda: _peers(ends.receiver) == 1, "the second is gone")
        await ends.connect()
        await put(first, b"first", b"unharmed")
        await ends.end(first)


def _peers(receiver: object) -> int:
    assert isinstance(receiver, SlotReceiver)
    return receiver.num_peers


async def test_a_receiver_that_gives_back_what_it_did_not_have() -> None:
    """The other direction is not trusted either."""
    async with nothing_left(), bound(KIND) as ends:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"\0{ends.offer.address}-stranger")
        listener.listen(1)
        listener.setblocking(False)
        ends.offer = type(ends.offer)(KIND, f"{ends.offer.address}-stranger")
        connecting = asyncio.ensure_future(ends.connect())
        sock, _ = await asyncio.get_running_loop().sock_accept(listener)
        await asyncio.get_running_loop().sock_sendall(sock, b"\x01")
        sender = await connecting
        sock.send(struct.pack("<I", 99))
        assert "gave back slot 99" in (await lost(sender)).message
        _, fds, _, _ = socket.recv_fds(sock, 1_000, 1)
        for fd in fds:
            os.close(fd)
        sock.close()
        listener.close()


async def test_a_writer_whose_time_is_over_reaches_nobody(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The fence: it holds its ring and writes on, after the receiver has begun a new life with
    another sender; not a byte of that sender's changes, and its own head arrives nowhere."""
    async with nothing_left(), bound(KIND) as ends:
        async with running(ends.receiver.run()):
            stopped = await ends.connect()
            await put(stopped, b"before", b"x" * FRAME_BYTES)
            await until(lambda: ends.received.heads == [b"before"], "the first part")
            slot = await stopped.room(FRAME_BYTES)
            assert slot is not None
        ends.receiver = receiver_of(KIND, ends.context, ends.received.on_part)
        ends.offer = ends.receiver.bind("127.0.0.1")
        async with running(ends.receiver.run()):
            other = await ends.connect()
            for number in range(50):
                room = await other.room(FRAME_BYTES)
                assert room is not None
                room[:] = b"%02d" % number * (FRAME_BYTES // 2)
                slot[:] = b"\xff" * FRAME_BYTES  # Between the other's write and its send.
                await other.send(b"%02d" % number, room)
            with pytest.raises(LinkLost):
                await stopped.send(b"late", slot)
            await ends.end(other)
        assert ends.received.heads == [b"before", *(b"%02d" % n for n in range(50)), b"end"]
        for head, payload in ends.received.parts[1:-1]:
            assert payload == head * (FRAME_BYTES // 2)
        del slot, room


async def test_the_memory_has_no_name() -> None:
    """So that no crash can leave it behind, and no size limit of /dev/shm applies."""
    async with linked(KIND) as (ends, sender):
        await put(sender, b"x", b"x" * FRAME_BYTES)
        shared = Holdings.now().shared
        assert len(shared) == 2, "both ends' mappings, here of one process"
        assert all(line.endswith("/memfd:baton-kv (deleted)") for line in shared)
        await ends.end(sender)
