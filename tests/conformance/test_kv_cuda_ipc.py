"""CUDA IPC with a driver made of bytearrays: the ring, its hello and who frees what when.

On a GPU ``tests/fault/test_kv_peer_death.py`` runs it for real (``-m gpu``).
"""

from __future__ import annotations

import secrets

import pytest
import zmq.asyncio

from baton.protocol.errors import ConfigError
from kv_transfer.transports import cuda_ipc
from kv_transfer.transports.contract import KvReceiver, LinkLost
from kv_transfer.transports.cuda_driver import HANDLE_BYTES
from kv_transfer.transports.cuda_ipc import HELLO, MAGIC, cuda_ipc_receiver, cuda_ipc_sender
from kv_transfer.transports.make import make_receiver, make_sender
from kv_transfer.transports.slots import SlotSender
from tests.conformance.kv_ends import Received, lost, nothing_left, put, running, until

FRAME_BYTES = 100_000


class BytearrayDriver:
    """Device memory that several "processes" have open; touching what is not there raises."""

    def __init__(self) -> None:
        self.memory: dict[int, bytearray] = {}
        self.handles: dict[bytes, int] = {}
        self.num_open = 0
        self._next = 2**40

    def host_memory(self, num_bytes: int) -> memoryview:
        return memoryview(bytearray(num_bytes))

    def allocate(self, num_bytes: int) -> int:
        self._next += 2**32
        self.memory[self._next] = bytearray(num_bytes)
        return self._next

    def free(self, pointer: int) -> None:
        assert not self.num_open, "freed while it is open"
        del self.memory[pointer]

    def export(self, pointer: int) -> bytes:
        handle = secrets.token_bytes(HANDLE_BYTES)
        self.handles[handle] = pointer
        return handle

    def open(self, handle: bytes) -> int:
        if handle not in self.handles:
            raise OSError("CUDA_ERROR_INVALID_VALUE")
        self.num_open += 1
        return self.handles[handle]

    def close(self, pointer: int) -> None:
        assert pointer in self.memory
        self.num_open -= 1

    def to_device(self, pointer: int, host: memoryview) -> None:
        base = max(start for start in self.memory if start <= pointer)
        self.memory[base][pointer - base : pointer - base + host.nbytes] = host

    def to_host(self, host: memoryview, pointer: int) -> None:
        base = max(start for start in self.memory if start <= pointer)
        host[:] = self.memory[base][pointer - base : pointer - base + host.nbytes]


async def connected(receiver: KvReceiver, driver: BytearrayDriver) -> SlotSender:
    sender = cuda_ipc_sender(FRAME_BYTES, driver)
    await sender.connect(receiver.bind(""))
    return sender


async def test_payloads_pass_through_device_memory_and_it_is_freed_last() -> None:
    driver, received = BytearrayDriver(), Received()
    async with nothing_left():
        receiver = cuda_ipc_receiver(received.on_part, driver)
        async with running(receiver.run()):
            sender = await connected(receiver, driver)
            for number in range(50):
                await put(sender, b"%d" % number, b"%02d" % number * 1_000)
            await sender.send(b"other memory", memoryview(b"x" * FRAME_BYTES))
            await sender.send(b"end", None)
            await until(lambda: len(received.parts) == 52, "all parts")
            assert len(driver.memory) == driver.num_open == 1
            received.gate.clear()
            await put(sender, b"late", b"read after the sender closed")
            sender.close()
            assert driver.memory, "the receiver has it open"
            received.gate.set()
            await until(lambda: not driver.memory, "the ring is freed")
            assert driver.num_open == 0
        assert received.parts[:50] == [(b"%d" % n, b"%02d" % n * 1_000) for n in range(50)]
        assert received.parts[50:52] == [(b"other memory", b"x" * FRAME_BYTES), (b"end", None)]


async def test_a_receiver_that_ends_lets_the_sender_free_its_ring() -> None:
    driver, received = BytearrayDriver(), Received()
    async with nothing_left():
        receiver = cuda_ipc_receiver(received.on_part, driver)
        async with running(receiver.run()):
            sender = await connected(receiver, driver)
            await put(sender, b"one", b"1")
            await until(lambda: received.heads == [b"one"], "the part")
        await lost(sender)
        sender.close()
        await until(lambda: not driver.memory, "the ring is freed")


@pytest.mark.parametrize(
    "hello",
    [
        HELLO.pack(b"baton-0\n", 4, 0, FRAME_BYTES, bytes(HANDLE_BYTES)),
        HELLO.pack(MAGIC, 5, 0, FRAME_BYTES, bytes(HANDLE_BYTES)),
        HELLO.pack(MAGIC, 4, 0, 2**40, bytes(HANDLE_BYTES)),
        HELLO.pack(MAGIC, 4, 0, FRAME_BYTES, b"a handle of nothing".ljust(HANDLE_BYTES)),
        MAGIC,
    ],
)
async def test_a_ring_that_cannot_be_is_refused(
    hello: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, received = BytearrayDriver(), Received()
    monkeypatch.setattr(cuda_ipc._DeviceRing, "offer", lambda ring, sock: sock.send(hello))
    async with nothing_left():
        receiver = cuda_ipc_receiver(received.on_part, driver)
        async with running(receiver.run()):
            with pytest.raises(LinkLost):
                await connected(receiver, driver)
            assert receiver.num_dropped == 1
            assert driver.num_open == 0


async def test_without_a_gpu_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    context = zmq.asyncio.Context()
    with pytest.raises(ConfigError, match="cuda_ipc needs a GPU on this worker; set it to auto"):
        make_receiver("cuda_ipc", context, Received().on_part)
    with pytest.raises(LinkLost, match="no GPU here"):
        make_sender("cuda_ipc", context, 1_000)
    context.destroy(linger=0)
