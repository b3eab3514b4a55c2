"""Pushing jobs over a link: what a pusher and a puller make of any transport.

Frames are cut, read and checked here, and hand-overs cancelled. Each on a transport with
memory of its own and on one without.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
import zmq.asyncio

from baton.messaging.codec import encode
from baton.protocol.layout import KvLayout
from baton.protocol.messages import Abort, KvFrame, KvOffer, TransferEnd, WorkerRef
from kv_transfer.frames import FrameCut
from kv_transfer.instructions import PushEnd, PushKv
from kv_transfer.puller import KvPuller
from kv_transfer.pusher import KvPusher
from kv_transfer.transports.contract import OnPart
from kv_transfer.transports.make import Receivers, make_sender
from kv_transfer.transports.uplink import Uplink
from tests.conformance.kv_ends import nothing_left, running, until

LAYOUT = KvLayout.uniform(
    num_layers=4, num_kv_heads=2, head_dim=64, dtype="float32", model_digest="conformance"
)
FRAME_BYTES = 256 * 1_024
DECODE = WorkerRef("d-0", "1", "tcp://unused")

pytestmark = pytest.mark.parametrize("kind", ["shared_memory", "zeromq"])


def kv_of(cut: FrameCut) -> bytes:
    """Bytes that tell where they belong."""
    rows = cut.num_layers * cut.num_tokens
    stamp = zlib.crc32(repr(cut).encode()).to_bytes(4, "big")
    return stamp * (rows * LAYOUT.bytes_per_token_layer // 4)


@dataclass
class Pushed:
    uplink: Uplink
    receivers: Receivers
    pusher: KvPusher
    puller: KvPuller
    offers: tuple[KvOffer, ...]
    context: zmq.asyncio.Context
    frames: list[tuple[KvFrame, bytes, int, str]] = field(default_factory=list)
    ends: list[TransferEnd] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Closed, nobody reads."""
    version: int = 1
    num_read: int = 0
    num_in_place: int = 0

    def push(self, transfer_id: str, num_tokens: int) -> None:
        self.pusher.put(
            PushKv(
                DECODE,
                transfer_id,
                1,
                0,
                (),
                0,
                num_tokens,
                num_tokens,
                range(LAYOUT.num_layers),
                version=self.version,
            )
        )
        self.pusher.put(
            PushEnd(DECODE, TransferEnd(transfer_id, 1, 0, num_tokens, (1,), self.version))
        )


@contextlib.asynccontextmanager
async def pushing(kind: str) -> AsyncIterator[Pushed]:
    context = zmq.asyncio.Context()

    async def on_frame(frame: KvFrame, payload: memoryview, checksum: int, transport: str) -> None:
        pushed.frames.append((frame, bytes(payload), checksum, transport))

    def read_kv(table: tuple[int, ...], cut: FrameCut, room: memoryview | None) -> memoryview:
        pushed.num_read += 1
        if room is None:
            return memoryview(kv_of(cut))
        pushed.num_in_place += 1
        room[:] = kv_of(cut)
        return room

    def handler(kind: str) -> OnPart:
        async def on_part(head: memoryview, payload: memoryview | None) -> None:
            await pushed.gate.wait()
            await puller.handler(kind)(head, payload)

        return on_part

    puller = KvPuller(on_frame, lambda end: pushed.ends.append(end))
    receivers = Receivers(kind, context, handler)
    pusher = KvPusher(LAYOUT, FRAME_BYTES, read_kv)
    uplink = Uplink("d-0", kind, lambda kind: make_sender(kind, context, FRAME_BYTES))
    offers = receivers.bind("127.0.0.1")
    pushed = Pushed(uplink, receivers, pusher, puller, offers, context)
    pushed.gate.set()
    try:
        async with running(receivers.run()):
            await uplink.open(offers)
            async with running(pusher.run(uplink)):
                yield pushed
    finally:
        uplink.close()
        context.destroy(linger=0)


async def test_frames_arrive_in_order_and_unharmed(kind: str) -> None:
    async with nothing_left(), pushing(kind) as pushed:
        for number in range(3):
            pushed.push(f"t{number}/0", 1_000 + number)
        await until(lambda: len(pushed.ends) == 3, "all three ends")
        by_transfer: dict[str, list[KvFrame]] = {}
        for frame, payload, checksum, transport in pushed.frames:
            cut = FrameCut(frame.layer_start, frame.num_layers, frame.token_start, frame.num_tokens)
            assert payload == kv_of(cut)
            assert checksum == frame.checksum
            assert transport == kind
            by_transfer.setdefault(frame.transfer_id, []).append(frame)
        assert list(by_transfer) == ["t0/0", "t1/0", "t2/0"]
        for number, frames in enumerate(by_transfer.values()):
            assert [f.index for f in frames] == list(range(len(frames)))
            rows = sum(f.num_layers * f.num_tokens for f in frames)
            assert rows == LAYOUT.num_layers * (1_000 + number)
        num_bytes = 3_003 * LAYOUT.bytes_per_token
        assert pushed.uplink.bytes_by_kind() == {kind: num_bytes}
        assert pushed.receivers.bytes_by_kind() == {kind: num_bytes}
        assert pushed.num_in_place == (pushed.num_read if kind == "shared_memory" else 0)


async def _stalled(pushed: Pushed) -> int:
    """Frames read until the pusher waits for room."""
    stalled_at = -1
    while stalled_at != pushed.num_read or not stalled_at:
        stalled_at = pushed.num_read
        await asyncio.sleep(0.3)
    return stalled_at


async def test_blocks_are_read_only_when_the_link_has_room(kind: str) -> None:
    async with pushing(kind) as pushed:
        pushed.gate.clear()
        num_tokens = 40_000
        pushed.push("big/0", num_tokens)
        num_frames = num_tokens * LAYOUT.bytes_per_token // FRAME_BYTES
        assert await _stalled(pushed) < num_frames / 4
        pushed.gate.set()
        await until(lambda: bool(pushed.ends), "the rest, once somebody reads")
        assert pushed.num_read >= num_frames


async def test_a_cancelled_transfer_stops_before_its_next_frame(kind: str) -> None:
    async with nothing_left(), pushing(kind) as pushed:
        pushed.gate.clear()
        for transfer in ("big/0", "queued/0", "wanted/0"):
            pushed.push(transfer, 40_000 if transfer == "big/0" else 100)
        stalled_at = await _stalled(pushed)
        pushed.pusher.cancel("queued/0")
        pushed.pusher.cancel("big/0")
        pushed.gate.set()
        await until(lambda: bool(pushed.ends), "what was not cancelled")
        assert [e.transfer_id for e in pushed.ends] == ["wanted/0"]
        assert {f.transfer_id for f, *_ in pushed.frames} == {"big/0", "wanted/0"}
        assert pushed.num_read == stalled_at + 2, "the two frames of the wanted one"


async def test_garbage_between_frames_costs_nothing_else(kind: str) -> None:
    async with nothing_left(), pushing(kind) as pushed:
        stranger = make_sender(kind, pushed.context, FRAME_BYTES)
        await stranger.connect(pushed.offers[0])
        await stranger.send(b"", None)
        await stranger.send(b"\xc1", None)
        await stranger.send(b"x" * 1_000, memoryview(b"y"))
        await stranger.send(encode(Abort("r", 0)), None)
        await stranger.send(encode(TransferEnd("t/0", 1, 0, 0, ())), memoryview(b"y"))
        pushed.push("t/0", 500)
        await until(lambda: bool(pushed.ends) and pushed.puller.num_dropped == 5, "both")
        assert sum(f.num_layers * f.num_tokens for f, *_ in pushed.frames) == 2_000
        stranger.close()
