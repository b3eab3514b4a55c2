"""Pushing jobs to one decode worker: read KV, frame it, hand it to whatever transport there is.

Knows no transport. A job is done in one go, jobs in the order they were put; what waits for
room on the link waits here, with its KV still in its blocks.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import Callable

from baton.messaging.codec import encode
from baton.protocol.layout import KvLayout
from baton.protocol.messages import KvFrame
from kv_transfer.frames import RAW, FrameCut, cut_frames
from kv_transfer.instructions import PushEnd, PushKv
from kv_transfer.transports.contract import KvOutlet

ReadKv = Callable[[tuple[int, ...], FrameCut, memoryview | None], memoryview]
"""A contiguous copy of a rectangle of KV, ``[layers, 2, tokens, kv_heads, head_dim]``: in the
memory given, which it fills, or else in memory of its own."""


class KvPusher:
    """One link to one decode worker. ``run`` sends jobs in the order they were put."""

    def __init__(self, layout: KvLayout, max_frame_bytes: int, read_kv: ReadKv) -> None:
        self._layout = layout
        self._fingerprint = layout.fingerprint()
        self._max_frame_bytes = max_frame_bytes
        self._read_kv = read_kv
        self._jobs: deque[PushKv | PushEnd] = deque()
        self._wake = asyncio.Event()
        self._cancelled_current = ""
        self._current = ""

    def put(self, job: PushKv | PushEnd) -> None:
        self._jobs.append(job)
        self._wake.set()

    def cancel(self, transfer_id: str) -> None:
        """Forget what is queued, and stop before the next frame of what is being sent."""
        self._jobs = deque(job for job in self._jobs if _transfer_of(job) != transfer_id)
        if self._current == transfer_id:
            self._cancelled_current = transfer_id

    async def run(self, outlet: KvOutlet) -> None:
        """Send until cancelled. Raises what ``outlet`` raises, and then lost its current job."""
        while True:
            while not self._jobs:
                self._wake.clear()
                await self._wake.wait()
            job = self._jobs.popleft()
            self._current, self._cancelled_current = _transfer_of(job), ""
            if isinstance(job, PushEnd):
                await outlet.send(encode(job.end), None)
            else:
                await self._push(job, outlet)
            self._current = ""

    async def _push(self, job: PushKv, outlet: KvOutlet) -> None:
        cuts = cut_frames(self._layout, job.token_start, job.num_tokens, self._max_frame_bytes)
        for index, cut in enumerate(cuts, job.first_index):
            num_bytes = cut.num_layers * cut.num_tokens * self._layout.bytes_per_token_layer
            room = await outlet.room(num_bytes)
            if self._cancelled_current == job.transfer_id:
                return
            # Read only now: up to here the blocks may have changed hands, from here on the
            # frame holds its own copy.
            payload = self._read_kv(job.block_table, cut, room)
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
            await outlet.send(encode(frame), payload)


def _transfer_of(job: PushKv | PushEnd) -> str:
    return job.transfer_id if isinstance(job, PushKv) else job.end.transfer_id
