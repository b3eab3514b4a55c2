"""What every KV transport must do, run on the real one: ZeroMQ over TCP on loopback.

Order, large frames, back-pressure, cancelling, garbage in between, a reader that dies and
comes back. A transport is a pusher (``put``, ``cancel``, ``run``) and a puller.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import zmq
import zmq.asyncio

from baton.protocol.layout import KvLayout
from baton.protocol.messages import KvFrame, TransferEnd, WorkerRef
from kv_transfer.frames import FrameCut
from kv_transfer.instructions import PushEnd, PushKv
from kv_transfer.zeromq import QUEUE_FRAMES, KvPuller, KvPusher

LAYOUT = KvLayout(
    num_layers=4, num_kv_heads=2, head_dim=64, dtype="float32", model_digest="conformance"
)
FRAME_BYTES = 256 * 1_024
DECODE = WorkerRef("d-0", "1", "tcp://unused")
TIMEOUT_S = 20.0


def read_kv(block_table: tuple[int, ...], cut: FrameCut) -> memoryview:
    """Bytes that tell where they belong."""
    rows = cut.num_layers * cut.num_tokens
    stamp = zlib.crc32(repr(cut).encode()).to_bytes(4, "big")
    return memoryview(stamp * (rows * LAYOUT.bytes_per_token_layer // 4))


@dataclass
class Received:
    frames: list[tuple[KvFrame, bytes, int]] = field(default_factory=list)
    ends: list[TransferEnd] = field(default_factory=list)


@dataclass
class Ends:
    context: zmq.asyncio.Context
    pusher: KvPusher
    received: Received
    address: str
    num_read: int = 0

    def push(self, transfer_id: str, num_tokens: int) -> None:
        self.pusher.put(PushKv(DECODE, transfer_id, 1, 0, (), 0, num_tokens))
        self.pusher.put(PushEnd(DECODE, TransferEnd(transfer_id, 1, 0, num_tokens, (1,))))


@contextlib.asynccontextmanager
async def running(*coroutines: object) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(c) for c in coroutines]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            assert task.cancelled(), task


def puller(context: zmq.asyncio.Context, received: Received) -> KvPuller:
    def on_frame(frame: KvFrame, payload: memoryview, checksum: int) -> None:
        received.frames.append((frame, bytes(payload), checksum))

    return KvPuller(context, on_frame, received.ends.append)


@contextlib.asynccontextmanager
async def linked() -> AsyncIterator[tuple[Ends, KvPuller]]:
    """Both ends bound and connected; the puller's ``run`` is the test's to start."""
    context = zmq.asyncio.Context()
    received = Received()
    pull = puller(context, received)
    address = pull.bind("127.0.0.1")
    ends = Ends(context, None, received, address)  # type: ignore[arg-type]

    def counted(block_table: tuple[int, ...], cut: FrameCut) -> memoryview:
        ends.num_read += 1
        return read_kv(block_table, cut)

    ends.pusher = KvPusher(context, LAYOUT, FRAME_BYTES, counted)
    ends.pusher.connect(address)
    try:
        yield ends, pull
    finally:
        context.destroy(linger=0)


async def until(condition: Callable[[], bool], what: str) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + TIMEOUT_S
    while not condition():
        assert loop.time() < end, f"not within {TIMEOUT_S} s: {what}"
        await asyncio.sleep(0.01)


async def test_frames_arrive_in_order_and_unharmed() -> None:
    async with linked() as (ends, pull), running(ends.pusher.run(), pull.run()):
        for number in range(3):
            ends.push(f"t{number}/0", 1_000 + number)
        await until(lambda: len(ends.received.ends) == 3, "all three ends")
        by_transfer: dict[str, list[KvFrame]] = {}
        for frame, payload, checksum in ends.received.frames:
            cut = FrameCut(frame.layer_start, frame.num_layers, frame.token_start, frame.num_tokens)
            assert payload == bytes(read_kv((), cut))
            assert checksum == frame.checksum
            by_transfer.setdefault(frame.transfer_id, []).append(frame)
        assert list(by_transfer) == ["t0/0", "t1/0", "t2/0"]
        for number, frames in enumerate(by_transfer.values()):
            assert [f.index for f in frames] == list(range(len(frames)))
            rows = sum(f.num_layers * f.num_tokens for f in frames)
            assert rows == LAYOUT.num_layers * (1_000 + number)
        assert pull.num_bytes == ends.pusher.num_bytes > 0


async def test_a_slow_reader_is_felt_by_the_sender() -> None:
    """Nothing reads: the sender stops after what the queues and TCP buffers take."""
    async with linked() as (ends, pull), running(ends.pusher.run()):
        num_tokens = 40_000
        ends.push("big/0", num_tokens)
        num_frames = num_tokens * LAYOUT.bytes_per_token // FRAME_BYTES
        await until(lambda: ends.num_read > QUEUE_FRAMES, "the queues fill")
        stalled_at = -1
        while stalled_at != ends.num_read:
            stalled_at = ends.num_read
            await asyncio.sleep(0.3)
        assert stalled_at < num_frames / 4, "blocks are read only when the link has room"
        async with running(pull.run()):
            await until(lambda: bool(ends.received.ends), "the rest, once somebody reads")
        assert ends.num_read >= num_frames


async def test_a_cancelled_transfer_stops_before_its_next_frame() -> None:
    async with linked() as (ends, pull), running(ends.pusher.run()):
        ends.push("big/0", 40_000)
        ends.push("queued/0", 100)
        ends.push("wanted/0", 100)
        await until(lambda: ends.num_read > QUEUE_FRAMES, "the queues fill")
        ends.pusher.cancel("queued/0")
        ends.pusher.cancel("big/0")
        async with running(pull.run()):
            await until(lambda: bool(ends.received.ends), "what was not cancelled")
        assert [e.transfer_id for e in ends.received.ends] == ["wanted/0"]
        assert {f.transfer_id for f, _, _ in ends.received.frames} == {"big/0", "wanted/0"}


async def test_garbage_between_frames_costs_nothing_else() -> None:
    async with linked() as (ends, pull), running(ends.pusher.run(), pull.run()):
        stranger = ends.context.socket(zmq.PUSH)
        stranger.connect(ends.address)
        for parts in ([b""], [b"\xc1"], [b"x" * 1_000, b"y"], [b"\x91\x01", b"", b""]):
            await stranger.send_multipart(parts)
        ends.push("t/0", 500)
        await until(lambda: bool(ends.received.ends) and pull.num_dropped == 4, "both")
        assert sum(f.num_layers * f.num_tokens for f, _, _ in ends.received.frames) == 2_000


async def test_a_reader_that_comes_back_is_found_again() -> None:
    """The same address, another process's socket: what is pushed from then on arrives."""
    async with linked() as (ends, pull), running(ends.pusher.run()):
        async with running(pull.run()):
            ends.push("before/0", 10)
            await until(lambda: bool(ends.received.ends), "the first transfer")
        again = puller(ends.context, ends.received)
        port = int(ends.address.rpartition(":")[2])
        await until(lambda: _bound(again, port), "the port is free again")
        async with running(again.run()):
            for number in range(50):
                ends.push(f"after-{number}/0", 10)
                await asyncio.sleep(0.02)
            await until(
                lambda: ends.received.ends[-1].transfer_id == "after-49/0", "the last transfer"
            )


def _bound(pull: KvPuller, port: int) -> bool:
    try:
        pull._socket.bind(f"tcp://127.0.0.1:{port}")
    except zmq.ZMQError:
        return False
    return True
