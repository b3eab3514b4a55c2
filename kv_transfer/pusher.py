"""Pushing jobs to one decode worker: read KV, code and frame it, hand it to whatever transport
there is.

Knows no transport. A job is done in one go, jobs in the order they were put; what waits for
room on the link waits here, with its KV still in its blocks, and its codec not chosen yet.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import msgspec

from baton.messaging.codec import encode
from baton.protocol.layout import KvLayout
from baton.protocol.messages import KvFrame, KvLink, KvProgress, TransferEnd
from kv_transfer.coding import KvCoding
from kv_transfer.controller import RECOMPUTE, CodecController, Rest
from kv_transfer.frames import RAW, FrameCut, Framing, end_checksum, frame_checksum, framings_of
from kv_transfer.instructions import PushEnd, PushKv
from kv_transfer.sent_rows import SentRows
from kv_transfer.transports.choose import NEAR
from kv_transfer.transports.contract import KvOutlet
from kv_transfer.window import STALL_S, Window

ReadKv = Callable[[tuple[int, ...], FrameCut, memoryview | None], memoryview]
"""A contiguous copy of a rectangle of KV, ``[layers, 2, tokens, kv_heads, head_dim]``: in the
memory given, which it fills, or else in memory of its own."""


class KvPusher:
    """One link to one decode worker. ``run`` sends jobs in the order they were put.

    coding: what codes; without it all frames are raw. controller: chooses among a job's codecs;
    without it the last of them is taken. reads_beside: KV is read in the codecs' thread too, since
    reading may wait.
    """

    def __init__(
        self,
        layout: KvLayout,
        max_frame_bytes: int,
        read_kv: ReadKv,
        *,
        coding: KvCoding | None = None,
        controller: CodecController | None = None,
        reads_beside: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._framings = framings_of(layout)
        self._max_frame_bytes = max_frame_bytes
        self._read_kv = read_kv
        self._coding = coding
        self._controller = controller
        self._rows: dict[str, SentRows] = {}
        """By transfer, until it is cancelled: its end may have to be said again."""
        self._reads_beside = reads_beside
        self._now = now
        self._jobs: deque[PushKv | PushEnd] = deque()
        self._wake = asyncio.Event()
        self._moved = asyncio.Event()
        self._cancelled_current = ""
        self._current = ""
        self.window = Window(max_frame_bytes)

    def put(self, job: PushKv | PushEnd) -> None:
        self._jobs.append(job)
        self._wake.set()

    def cancel(self, transfer_id: str, *, is_committed: bool = False) -> None:
        """Forget what is queued, and stop before the next frame of what is being sent."""
        self._jobs = deque(job for job in self._jobs if _transfer_of(job) != transfer_id)
        if self._current == transfer_id:
            self._cancelled_current = transfer_id
        self._rows.pop(transfer_id, None)
        self.window.closed(transfer_id)
        if self._controller is not None:
            self._controller.closed(transfer_id, self._now(), is_committed=is_committed)
        self._moved.set()

    def progressed(self, progress: KvProgress) -> None:
        if progress.transfer_id not in self._rows:
            return  # Said before the peer heard of its end: nobody would forget it again.
        now, p = self._now(), progress
        if self._controller is not None:
            self._controller.progressed(p.transfer_id, p.epoch, p.num_frames, p.decode_s, now)
        if self.window.progressed(progress, now):
            self._moved.set()

    def told(self, link: KvLink) -> KvLink:
        """With what its controller made of it."""
        controller = self._controller
        if controller is None or not controller.num_chosen:
            return link
        forecasts = controller.forecasts
        chosen = (f"{codec} {count}" for codec, count in controller.num_chosen.most_common())
        return msgspec.structs.replace(
            link,
            codecs=", ".join(chosen),
            bytes_per_s=int(controller.bytes_per_s(self._now())),
            num_predicted=forecasts.count,
            predicted_s=forecasts.predicted_s,
            actual_s=forecasts.actual_s,
            error_s=forecasts.error_s,
        )

    async def run(self, outlet: KvOutlet) -> None:
        """Send until cancelled. Raises what ``outlet`` raises, and then lost its current job."""
        while True:
            while not self._jobs:
                self._wake.clear()
                await self._wake.wait()
            job = self._jobs.popleft()
            self._current, self._cancelled_current = _transfer_of(job), ""
            if isinstance(job, PushEnd):
                await outlet.send(encode(self._end(job)), None)
            else:
                await self._push(job, outlet)
            self._current = ""

    def _end(self, job: PushEnd) -> TransferEnd:
        if job.end.version < 2:
            return job.end
        lag_s = max(0.0, self._now() - job.prefilled_at)
        rows = self._rows.get(job.end.transfer_id)
        end = job.end if rows is None else rows.cut_short(job.end)
        end = msgspec.structs.replace(end, lag_s=lag_s)
        return msgspec.structs.replace(end, checksum=end_checksum(end))

    async def _push(self, job: PushKv, outlet: KvOutlet) -> None:
        framing = self._framings[job.version]
        rows = self._rows.get(job.transfer_id)
        if rows is None or rows.epoch != job.epoch:
            rows = SentRows(framing, job.epoch, job.num_tokens_total)
            self._rows[job.transfer_id] = rows
        cuts = framing.cuts(
            job.token_start,
            job.num_tokens,
            self._max_frame_bytes,
            num_tokens_total=job.num_tokens_total,
            layers=job.layers,
        )
        for index, cut in enumerate(cuts, job.first_index):
            if rows.is_stopped:
                return
            num_bytes = framing.num_bytes(cut)
            has_credit = job.version > 1 and outlet.kind not in NEAR
            if has_credit:
                await self._credit(num_bytes)
            room = await outlet.room(num_bytes)
            # From here on the blocks may be read: they are the transfer's until it is cancelled.
            if self._is_cancelled(job):
                return
            began = self._now()
            codec = self._choose(job, rows, num_bytes, is_near=not has_credit, now=began)
            if codec == RECOMPUTE:
                rows.stop()
                return
            if codec == RAW and not self._reads_beside:
                payload = self._read_kv(job.block_table, cut, room)
            else:
                assert self._coding is not None
                made = partial(self._coded, self._coding, codec, job, cut)
                codec, payload = await self._coding.run(made)
                # It may have been read while the blocks were already another's.
                if self._is_cancelled(job):
                    return
                room = await outlet.room(payload.nbytes)
                if self._is_cancelled(job):
                    return
                if room is not None:
                    room[:] = payload
                    payload = room
            frame = _frame(job, framing, index, cut, codec, payload)
            rows.add(cut)
            if has_credit:
                self._sent(job, codec, num_bytes, payload.nbytes, began)
            await outlet.send(encode(frame), payload)

    def _choose(
        self, job: PushKv, rows: SentRows, num_bytes: int, *, is_near: bool, now: float
    ) -> str:
        """The codec of a frame of so many raw bytes, or RECOMPUTE."""
        if self._controller is None:
            return job.codecs[-1] if job.codecs else RAW
        if is_near:
            return RAW
        computed_in_s = max(0.0, job.computed_at - now)
        is_last = job.token_start + job.num_tokens == job.num_tokens_total
        rest = Rest(
            num_bytes=max(num_bytes, rows.num_bytes_total - rows.num_bytes),
            frame_bytes=num_bytes,
            num_tokens=job.num_tokens_total,
            num_kept=rows.num_kept,
            may_recompute=job.may_recompute and is_last and not computed_in_s,
            computed_in_s=computed_in_s,
        )
        codecs = self._ready(job.codecs)
        return self._controller.choose(job.transfer_id, codecs, rest, now).codec

    def _ready(self, codecs: tuple[str, ...]) -> tuple[str, ...]:
        """Those that can be used without compiling them first."""
        if self._coding is None:
            return (RAW,)
        self._coding.prepare(codecs)
        return tuple(name for name in codecs if self._coding.is_ready(name)) or (RAW,)

    def _sent(self, job: PushKv, codec: str, num_bytes: int, num_coded: int, began: float) -> None:
        now = self._now()
        self.window.sent(job.transfer_id, job.epoch, num_coded, now)
        if self._controller is not None:
            self._controller.sent(
                job.transfer_id, job.epoch, codec, num_bytes, num_coded, now - began, now
            )

    def _is_cancelled(self, job: PushKv) -> bool:
        return self._cancelled_current == job.transfer_id

    def _coded(
        self, coding: KvCoding, codec: str, job: PushKv, cut: FrameCut
    ) -> tuple[str, memoryview]:
        """What does not get smaller goes as it is: no frame is larger than it was cut, and
        transports with memory of their own have room for no more."""
        raw = self._read_kv(job.block_table, cut, None)
        if codec == RAW:
            return RAW, raw
        coded = coding.encode(codec, raw, cut, job.num_tokens_total)
        return (codec, coded) if coded.nbytes < raw.nbytes else (RAW, raw)

    async def _credit(self, num_bytes: int) -> None:
        while not self.window.has_room(num_bytes, self._now()):
            self._moved.clear()
            try:
                async with asyncio.timeout(STALL_S):
                    await self._moved.wait()
            except TimeoutError:
                continue


def _frame(
    job: PushKv, framing: Framing, index: int, cut: FrameCut, codec: str, payload: memoryview
) -> KvFrame:
    frame = KvFrame(
        transfer_id=job.transfer_id,
        epoch=job.epoch,
        fingerprint=framing.fingerprint,
        index=index,
        layer_start=cut.layer_start,
        num_layers=cut.num_layers,
        token_start=cut.token_start,
        num_tokens=cut.num_tokens,
        codec=codec,
        num_bytes=payload.nbytes,
        checksum=0,
        version=job.version,
        group=cut.group,
    )
    return msgspec.structs.replace(frame, checksum=frame_checksum(frame, payload))


def _transfer_of(job: PushKv | PushEnd) -> str:
    return job.transfer_id if isinstance(job, PushKv) else job.end.transfer_id
