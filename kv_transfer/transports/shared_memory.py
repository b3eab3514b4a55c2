"""One machine: payloads lie in memory that both processes map, heads go over a Unix socket.

The ring is an anonymous file (memfd) that has no name anywhere; its descriptor is passed over
the socket of ``slots``. Whoever dies, however, the kernel frees it with the last process that
maps it. KV is gathered straight into a slot, and the receiver reads in place.

Fencing: a sender has its own ring mapped and nothing else. What a sender writes whose epoch is
dead, or whom the receiver has left, lands where nobody reads: slots are never given to another
sender, and KV blocks are written by their owner alone, after it allowed that very frame. The
file is sealed, so that a sender cannot shrink it under its reader.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct

from baton.messaging.sockets import MAX_PART_BYTES
from kv_transfer.transports.contract import QUEUE_FRAMES, LinkLost, OnPart
from kv_transfer.transports.links import BrokenFormat
from kv_transfer.transports.slots import SlotReceiver, SlotSender

KIND = "shared_memory"

HELLO = struct.Struct("<8sIIQ")  # magic, number of slots, 0, bytes of a slot; with a descriptor
MAGIC = b"baton-1\n"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def shared_memory_sender(max_frame_bytes: int) -> SlotSender:
    return SlotSender(KIND, _MemfdRing(max_frame_bytes))


def shared_memory_receiver(on_part: OnPart) -> SlotReceiver:
    return SlotReceiver(KIND, take_ring, on_part)


class _MemfdRing:
    def __init__(self, max_frame_bytes: int) -> None:
        self.slot_bytes = -(-max_frame_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory: mmap.mmap | None = None

    def offer(self, sock: socket.socket) -> None:
        fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, QUEUE_FRAMES * self.slot_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            self._memory = mmap.mmap(fd, QUEUE_FRAMES * self.slot_bytes)
            hello = HELLO.pack(MAGIC, QUEUE_FRAMES, 0, self.slot_bytes)
            socket.send_fds(sock, [hello], [fd])
        finally:
            os.close(fd)

    def room(self, slot: int, num_bytes: int) -> memoryview:
        if self._memory is None:
            raise LinkLost("the ring is gone")
        start = slot * self.slot_bytes
        return memoryview(self._memory)[start : start + num_bytes]

    def owns(self, payload: memoryview) -> bool:
        return payload.obj is self._memory

    def publish(self, slot: int, num_bytes: int) -> None:
        """The receiver maps the same memory, and the socket orders the head behind it."""

    def close(self, sock: socket.socket) -> None:
        # Unmapped with the last view of it: a frame may be on its way into a slot right now.
        self._memory = None
        sock.close()


class _MappedRing:
    def __init__(self, memory: mmap.mmap, num_slots: int, slot_bytes: int) -> None:
        self._memory: mmap.mmap | None = memory
        self._num_slots = num_slots
        self._slot_bytes = slot_bytes

    def slot(self, slot: int, num_bytes: int) -> memoryview:
        if not 0 <= slot < self._num_slots or num_bytes > self._slot_bytes:
            raise BrokenFormat(f"{num_bytes} bytes in slot {slot} of a ring of {self._num_slots}")
        assert self._memory is not None
        start = slot * self._slot_bytes
        return memoryview(self._memory)[start : start + num_bytes]

    def close(self) -> None:
        self._memory = None


def take_ring(sock: socket.socket) -> _MappedRing:
    hello, fds, _, _ = socket.recv_fds(sock, HELLO.size, 1)
    try:
        if len(hello) != HELLO.size or len(fds) != 1:
            raise BrokenFormat(f"a hello of {len(hello)} bytes with {len(fds)} descriptors")
        magic, num_slots, _, slot_bytes = HELLO.unpack(hello)
        if magic != MAGIC:
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
    return _MappedRing(memory, num_slots, slot_bytes)
