"""KV bytes over ZeroMQ: PUSH from the prefill side, PULL at the decode side.

The fallback of every faster transport, and the one that works anywhere. A few frames fit
into the queues of a link; beyond that the pushing task waits, so a slow reader is felt at
the source and nothing piles up.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections import deque
from collections.abc import Callable
from typing import Any

import zmq
import zmq.asyncio

from baton.messaging import sockets
from baton.messaging.codec import decode, encode
from baton.messaging.turns import Turns
from baton.protocol.errors import WireError
from baton.protocol.layout import KvLayout
from baton.protocol.messages import KvFrame, TransferEnd
from kv_transfer.frames import RAW, FrameCut, cut_frames
from kv_transfer.instructions import PushEnd, PushKv

log = logging.getLogger(__name__)

QUEUE_FRAMES = 4
TRANSPORT = "zeromq"

ReadKv = Callable[[tuple[int, ...], FrameCut], memoryview]
"""Own, contiguous copy of a rectangle of KV: ``[layers, 2, tokens, kv_heads, head_dim]``."""


class KvPusher:
    """One link to one decode worker. ``run`` sends jobs in the order they were put."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        layout: KvLayout,
        max_frame_bytes: int,
        read_kv: ReadKv,
    ) -> None:
        self._layout = layout
        self._fingerprint = layout.fingerprint()
        self._max_frame_bytes = max_frame_bytes
        self._read_kv = read_kv
        self._jobs: deque[PushKv | PushEnd] = deque()
        self._wake = asyncio.Event()
        self._cancelled_current = ""
        self._current = ""
        self.num_bytes = 0
        self._socket = context.socket(zmq.PUSH)
        sockets.configure(
            self._socket, queue_frames=QUEUE_FRAMES, max_part_bytes=sockets.MAX_PART_BYTES
        )

    def put(self, job: PushKv | PushEnd) -> None:
        self._jobs.append(job)
        self._wake.set()

    def cancel(self, transfer_id: str) -> None:
        """Forget what is queued, and stop before the next frame of what is being sent."""
        self._jobs = deque(job for job in self._jobs if _transfer_of(job) != transfer_id)
        if self._current == transfer_id:
            self._cancelled_current = transfer_id

    def close(self) -> None:
        """Forget all jobs and close the socket; ``run`` may never have been started."""
        self._jobs.clear()
        self._socket.close()

    def connect(self, address: str) -> None:
        """Raises WireError for an address that cannot be one."""
        sockets.connect(self._socket, address)

    async def run(self) -> None:
        """Send until cancelled; closes the socket. ``connect`` comes first."""
        try:
            while True:
                while not self._jobs:
                    self._wake.clear()
                    await self._wake.wait()
                job = self._jobs.popleft()
                self._current, self._cancelled_current = _transfer_of(job), ""
                if isinstance(job, PushEnd):
                    await self._socket.send_multipart([encode(job.end)])
                else:
                    await self._push(job)
                self._current = ""
        finally:
            self._socket.close()

    async def _push(self, job: PushKv) -> None:
        cuts = cut_frames(self._layout, job.token_start, job.num_tokens, self._max_frame_bytes)
        for index, cut in enumerate(cuts, job.first_index):
            await _writable(self._socket)
            if self._cancelled_current == job.transfer_id:
                return
            # Read only now: up to here the blocks may have changed hands, from here on the
            # frame holds its own copy.
            payload = self._read_kv(job.block_table, cut)
            frame = KvFrame(
                transfer_id=job.transfer_id,
                epoch=job.epoch,
                fingerprint=self._fingerprint,
                index=index,
                layer_start=cut.layer_start,
                num_layers=cut.num_layers,
                token_start=cut.token_start,
                num_tokens=cut.num_tokens,
                codec=RAW,
                num_bytes=payload.nbytes,
                checksum=zlib.crc32(payload),
            )
            await self._socket.send_multipart([encode(frame), payload], copy=False)
            self.num_bytes += payload.nbytes


class KvPuller:
    """The bound end. Handlers run on the event loop, in the order of arrival per sender."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        on_frame: Callable[[KvFrame, memoryview, int], None],
        on_end: Callable[[TransferEnd], None],
    ) -> None:
        self._on_frame = on_frame
        self._on_end = on_end
        self.num_bytes = 0
        self.num_dropped = 0
        self._socket = context.socket(zmq.PULL)
        sockets.configure(
            self._socket, queue_frames=QUEUE_FRAMES, max_part_bytes=sockets.MAX_PART_BYTES
        )

    def bind(self, host: str) -> str:
        return sockets.bind(self._socket, host)

    async def run(self) -> None:
        """Receive until cancelled; closes the socket."""
        turns = Turns()
        try:
            while True:
                parts = await self._socket.recv_multipart(copy=False)
                self._receive([part.buffer for part in parts])
                await turns.take()
        finally:
            self._socket.close()

    def _receive(self, parts: list[memoryview]) -> None:
        try:
            message = decode(parts[0])
            if isinstance(message, TransferEnd) and len(parts) == 1:
                self._on_end(message)
            elif isinstance(message, KvFrame) and len(parts) == 2:
                self.num_bytes += parts[1].nbytes
                self._on_frame(message, parts[1], zlib.crc32(parts[1]))
            else:
                raise WireError(f"{type(message).__name__} with {len(parts)} parts on a KV link")
        except WireError as exc:
            self.num_dropped += 1
            if self.num_dropped & (self.num_dropped - 1) == 0:
                log.warning("dropped KV: %s (%d so far)", exc, self.num_dropped)


async def _writable(socket: zmq.asyncio.Socket) -> None:
    """The stubs of pyzmq do not know that an asyncio socket's poll takes flags."""
    poll: Any = socket.poll
    await poll(flags=zmq.POLLOUT)


def _transfer_of(job: PushKv | PushEnd) -> str:
    return job.transfer_id if isinstance(job, PushKv) else job.end.transfer_id
