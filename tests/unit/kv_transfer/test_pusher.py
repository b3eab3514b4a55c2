"""Frames of one link: coded as chosen, within the window, and cut short where that is chosen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest

from baton.messaging.codec import decode
from baton.protocol.layout import KvLayout
from baton.protocol.messages import KvFrame, KvProgress, TransferEnd
from kv_transfer.codecs.contract import Quality
from kv_transfer.coding import KvCoding
from kv_transfer.controller import RECOMPUTE, Choice, CodecController, Rest
from kv_transfer.frames import RAW, Coverage, FrameCut, Framing, end_checksum, frame_checksum
from kv_transfer.instructions import PushEnd, PushKv
from kv_transfer.pusher import KvPusher
from kv_transfer.window import MIN_FRAMES
from tests.conformance.kv_ends import until
from tests.support.core import DECODE

LAYOUT = KvLayout.uniform(
    num_layers=4, num_kv_heads=2, head_dim=8, dtype="bfloat16", model_digest="m"
)
FRAMING = Framing(LAYOUT, 2)
NUM_TOKENS = 64
FRAME_BYTES = 16 * LAYOUT.bytes_per_token
RNG = np.random.default_rng(3)
KV = (RNG.standard_normal((4, 2, NUM_TOKENS, 2, 8)).astype("<f4").view("<u4") >> 16).astype("<u2")


def rows_of(cut: FrameCut) -> bytes:
    layers = slice(cut.layer_start, cut.layer_start + cut.num_layers)
    return KV[layers, :, cut.token_start : cut.token_start + cut.num_tokens].tobytes()


class Scripted(CodecController):
    """Chooses what it is told to, in turn; then raw."""

    def __init__(self, choices: Sequence[str]) -> None:
        super().__init__({RAW: Quality.EXACT})
        self.choices = list(choices)
        self.rests: list[Rest] = []

    def choose(self, transfer_id: str, codecs: Sequence[str], rest: Rest, now: float) -> Choice:
        self.rests.append(rest)
        return Choice(self.choices.pop(0) if self.choices else RAW, 0.0, {})


@dataclass
class Outlet:
    kind: str = "zeromq"
    parts: list[tuple[bytes, bytes | None]] = field(default_factory=list)
    memory: bytearray | None = None

    async def room(self, num_bytes: int) -> memoryview | None:
        return None if self.memory is None else memoryview(self.memory)[:num_bytes]

    async def send(self, head: bytes, payload: memoryview | None) -> None:
        self.parts.append((head, None if payload is None else bytes(payload)))

    @property
    def frames(self) -> list[tuple[KvFrame, bytes]]:
        return [(decode(head), payload) for head, payload in self.parts if payload is not None]

    @property
    def ends(self) -> list[TransferEnd]:
        return [decode(head) for head, payload in self.parts if payload is None]


@dataclass
class Pushing:
    pusher: KvPusher
    outlet: Outlet
    coding: KvCoding

    def push(self, start: int = 0, count: int = NUM_TOKENS, first: int = 0) -> None:
        job = PushKv(
            DECODE,
            "r/0",
            1,
            first,
            (),
            start,
            count,
            NUM_TOKENS,
            range(4),
            2,
            (RAW, "split", "int8"),
            True,
        )
        self.pusher.put(job)

    def end(self, num_frames: int = 4) -> None:
        said = TransferEnd("r/0", 1, num_frames, NUM_TOKENS, (7,), 2)
        self.pusher.put(PushEnd(DECODE, said, 0.0))

    async def settle(self, num_parts: int) -> None:
        await until(lambda: len(self.outlet.parts) >= num_parts, f"{num_parts} parts")


@asynccontextmanager
async def pushing(
    choices: Sequence[str] = (), *, kind: str = "zeromq", memory: bytearray | None = None
) -> AsyncIterator[Pushing]:
    coding = KvCoding(LAYOUT)
    pusher = KvPusher(
        LAYOUT,
        FRAME_BYTES,
        lambda table, cut, room: memoryview(rows_of(cut)),
        coding=coding,
        controller=Scripted(choices),
    )
    pushed = Pushing(pusher, Outlet(kind, memory=memory), coding)
    task = asyncio.get_running_loop().create_task(pusher.run(pushed.outlet))
    try:
        yield pushed
    finally:
        task.cancel()
        await asyncio.wait([task])
        coding.close()


def written(frames: list[tuple[KvFrame, bytes]], num_frames: int) -> KvProgress:
    num_bytes = sum(len(payload) for _, payload in frames[:num_frames])
    return KvProgress("r/0", 1, num_frames, num_bytes, 0.001)


@pytest.mark.parametrize("memory", [None, bytearray(1 << 20)])
async def test_each_frame_goes_through_the_codec_that_was_chosen_for_it(
    memory: bytearray | None,
) -> None:
    async with pushing(["split", RAW, "int8"], memory=memory) as p:
        p.push()
        await p.settle(MIN_FRAMES)
        coverage = Coverage(FRAMING, NUM_TOKENS, frozenset({RAW, "split", "int8"}))
        for frame, payload in p.outlet.frames:
            coverage.check(frame, len(payload), frame_checksum(frame, payload))
            coverage.add(frame)
            layers = frame.layer_start, frame.num_layers
            cut = FrameCut(*layers, frame.token_start, frame.num_tokens)
            if frame.codec == RAW:
                assert payload == rows_of(cut)
            elif frame.codec == "split":
                assert bytes(p.coding.decode("split", payload, cut, NUM_TOKENS)) == rows_of(cut)
        assert [frame.codec for frame, _ in p.outlet.frames] == ["split", RAW, "int8"]


async def test_no_more_is_on_its_way_than_the_window_holds() -> None:
    async with pushing() as p:
        p.push()
        p.end()
        await p.settle(MIN_FRAMES)
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert len(p.outlet.parts) == MIN_FRAMES
        p.pusher.progressed(written(p.outlet.frames, 1))
        await p.settle(5)
        assert [end.num_tokens for end in p.outlet.ends] == [NUM_TOKENS]
        assert p.outlet.ends[0].checksum == end_checksum(p.outlet.ends[0])


async def test_near_by_there_is_no_window_and_no_choice() -> None:
    async with pushing(["int8"] * 9, kind="shared_memory") as p:
        p.push()
        p.end()
        await p.settle(5)
        assert {frame.codec for frame, _ in p.outlet.frames} == {RAW}


async def test_what_is_left_to_the_other_end_is_not_sent_and_the_end_says_so() -> None:
    async with pushing([RAW, RAW, RECOMPUTE]) as p:
        p.push(0, 16, 0)
        p.push(16, 16, 1)
        p.push(32, 32, 2)
        p.end()
        p.end()
        await p.settle(4)
        assert [frame.index for frame, _ in p.outlet.frames] == [0, 1]
        first, again = p.outlet.ends
        assert (first.num_frames, first.num_tokens) == (2, 32)
        assert (again.num_frames, again.num_tokens) == (2, 32), "said again, the same"
        coverage = Coverage(FRAMING, NUM_TOKENS)
        for frame, _ in p.outlet.frames:
            coverage.add(frame)
        assert coverage.covers(first.num_tokens)


async def test_a_chunk_of_which_only_some_layers_went_is_left_whole() -> None:
    async with pushing([RAW, RAW, RECOMPUTE]) as p:
        p.push(0, 16, 0)
        p.push(16, 48, 1)
        p.end()
        await p.settle(3)
        [end] = p.outlet.ends
        assert (end.num_frames, end.num_tokens) == (2, 16)


async def test_a_new_epoch_begins_from_nothing() -> None:
    async with pushing([RECOMPUTE]) as p:
        p.push()
        p.end()
        await p.settle(1)
        assert (p.outlet.ends[0].num_frames, p.outlet.ends[0].num_tokens) == (0, 0)
        p.pusher.cancel("r/0")
        p.push(0, 16, 0)
        p.end(1)
        await p.settle(3)
        assert p.outlet.ends[1].num_tokens == NUM_TOKENS


async def test_what_does_not_get_smaller_goes_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no frame outgrows the memory that a transport has for it."""
    encode = KvCoding.encode

    def longer(coding: KvCoding, *args: object) -> memoryview:
        return memoryview(bytes(encode(coding, *args)) + bytes(FRAME_BYTES))  # type: ignore[arg-type]

    monkeypatch.setattr(KvCoding, "encode", longer)
    async with pushing(["split"], memory=bytearray(FRAME_BYTES)) as p:
        p.push(count=16)
        await p.settle(1)
        [(frame, payload)] = p.outlet.frames
        assert (frame.codec, frame.num_bytes) == (RAW, FRAME_BYTES)
        layers = frame.layer_start, frame.num_layers
        assert payload == rows_of(FrameCut(*layers, frame.token_start, frame.num_tokens))
