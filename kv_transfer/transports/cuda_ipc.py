"""One GPU host: payloads pass through device memory of the sender that the receiver has opened.

The ring is device memory, its handle goes over the socket of ``slots``. Codecs and checksums
work on the host so far, so both ends copy between a slot and page-locked memory: shared memory
is the shorter way, ``auto`` never takes this one, and it is used where it is asked for by name.

Fencing: a sender writes its own ring, which no other sender is given; the receiver copies a
payload out before it looks at it, and KV blocks are written by their owner alone. Device memory
must outlive everybody who has it open, so the sender frees the ring when the receiver has closed
it and said so by closing the socket, or is dead; a receiver that is stopped keeps it until then.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from functools import partial

import torch

from baton.messaging.sockets import MAX_PART_BYTES
from baton.protocol.errors import ConfigError
from kv_transfer.transports.contract import QUEUE_FRAMES, LinkLost, OnPart
from kv_transfer.transports.cuda_driver import HANDLE_BYTES, CudaDriver, Driver
from kv_transfer.transports.links import READ_BYTES, BrokenFormat
from kv_transfer.transports.slots import SlotReceiver, SlotSender

KIND = "cuda_ipc"

HELLO = struct.Struct(f"<8sIIQ{HANDLE_BYTES}s")  # magic, number of slots, 0, bytes of one, handle
MAGIC = b"baton-g1"


def cuda_ipc_sender(max_frame_bytes: int, driver: Driver | None = None) -> SlotSender:
    """Raises LinkLost where there is no GPU."""
    if driver is None and not torch.cuda.is_available():
        raise LinkLost("no GPU here")
    return SlotSender(KIND, _DeviceRing(max_frame_bytes, driver or CudaDriver()))


def cuda_ipc_receiver(on_part: OnPart, driver: Driver | None = None) -> SlotReceiver:
    """Raises ConfigError where there is no GPU."""
    if driver is None and not torch.cuda.is_available():
        raise ConfigError(
            "kv_transfer.transport: cuda_ipc needs a GPU on this worker; "
            "set it to auto or to zeromq"
        )
    return SlotReceiver(KIND, partial(take_ring, driver or CudaDriver()), on_part)


class _DeviceRing:
    def __init__(self, max_frame_bytes: int, driver: Driver) -> None:
        self.slot_bytes = max_frame_bytes
        self._driver = driver
        self._pointer = 0
        self._host: memoryview | None = None

    def offer(self, sock: socket.socket) -> None:
        num_bytes = QUEUE_FRAMES * self.slot_bytes
        self._host = self._driver.host_memory(num_bytes)
        self._pointer = self._driver.allocate(num_bytes)
        handle = self._driver.export(self._pointer)
        sock.send(HELLO.pack(MAGIC, QUEUE_FRAMES, 0, self.slot_bytes, handle))

    def room(self, slot: int, num_bytes: int) -> memoryview:
        if self._host is None:
            raise LinkLost("the ring is gone")
        start = slot * self.slot_bytes
        return self._host[start : start + num_bytes]

    def owns(self, payload: memoryview) -> bool:
        return self._host is not None and payload.obj is self._host.obj

    def publish(self, slot: int, num_bytes: int) -> None:
        start = slot * self.slot_bytes
        self._driver.to_device(self._pointer + start, self.room(slot, num_bytes))

    def close(self, sock: socket.socket) -> None:
        self._host = None
        pointer, self._pointer = self._pointer, 0
        if not pointer:
            sock.close()
            return
        with contextlib.suppress(OSError):  # It has hung up already.
            sock.shutdown(socket.SHUT_WR)
        asyncio.get_running_loop().add_reader(sock, self._closed, sock, pointer)

    def _closed(self, sock: socket.socket, pointer: int) -> None:
        """Slots that are given back still come in before the end does."""
        try:
            if sock.recv(READ_BYTES):
                return
        except BlockingIOError:
            return
        except ConnectionError:
            pass  # The receiver is dead, which is as good.
        asyncio.get_running_loop().remove_reader(sock)
        sock.close()
        self._driver.free(pointer)


class _OpenedRing:
    def __init__(self, driver: Driver, pointer: int, num_slots: int, slot_bytes: int) -> None:
        self._driver = driver
        self._pointer = pointer
        self._num_slots = num_slots
        self._slot_bytes = slot_bytes
        self._host = driver.host_memory(slot_bytes)

    def slot(self, slot: int, num_bytes: int) -> memoryview:
        if not 0 <= slot < self._num_slots or num_bytes > self._slot_bytes:
            raise BrokenFormat(f"{num_bytes} bytes in slot {slot} of a ring of {self._num_slots}")
        payload = self._host[:num_bytes]
        self._driver.to_host(payload, self._pointer + slot * self._slot_bytes)
        return payload.toreadonly()

    def close(self) -> None:
        self._driver.close(self._pointer)


def take_ring(driver: Driver, sock: socket.socket) -> _OpenedRing:
    hello = sock.recv(HELLO.size)
    if len(hello) != HELLO.size:
        raise BrokenFormat(f"a hello of {len(hello)} bytes")
    magic, num_slots, _, slot_bytes, handle = HELLO.unpack(hello)
    if magic != MAGIC:
        raise BrokenFormat(f"a hello of another version: {magic!r}")
    if not 0 < num_slots <= QUEUE_FRAMES or not 0 < slot_bytes <= MAX_PART_BYTES:
        raise BrokenFormat(f"a ring of {num_slots} slots of {slot_bytes} bytes")
    return _OpenedRing(driver, driver.open(handle), num_slots, slot_bytes)
