"""Hand-overs with a peer of wire version 1, at either end: the recorded one, word for word.

What is recorded of the other end is said here at the points where it was said there; what this
build says then must be, as far as that peer reads, what its own kind said.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import numpy as np
import pytest

from baton.engine.block_pool import BlockPool
from baton.messaging.codec import decode
from baton.protocol.messages import (
    Granted,
    KvFrame,
    LeaseRenew,
    Message,
    Reserve,
    TransferAck,
    TransferEnd,
    TransferNack,
)
from kv_transfer.frames import FrameCut, frame_checksum
from kv_transfer.instructions import Arrived, PushEnd, PushKv, SendClosed, ToDecode, ToPrefill
from kv_transfer.pusher import KvPusher
from kv_transfer.receiver import Receiver
from kv_transfer.sender import Sender, owner_name
from tests.conformance.recorded import (
    LAYOUT,
    NUM_TOKENS,
    RECORDED,
    as_version_1_reads,
    plain,
    recorded_kv,
)
from tests.support.core import DECODE, body, engine_config, transfer_config

T = "r/0"
KV = recorded_kv()
SCENES = ("hand_over", "hand_over_with_a_damaged_frame")
Scene = list[tuple[str, str]]


def rectangle(cut: FrameCut | KvFrame) -> np.ndarray:
    layers = slice(cut.layer_start, cut.layer_start + cut.num_layers)
    return KV[layers, :, cut.token_start : cut.token_start + cut.num_tokens]


def payload_of(cut: FrameCut | KvFrame) -> memoryview:
    return np.ascontiguousarray(rectangle(cut)).reshape(-1).view(np.uint8).data


class DecodeEnd:
    """This build's receiver; blocks of 16."""

    def __init__(self) -> None:
        self.pool = BlockPool(8, 16)
        engine = engine_config(num_blocks=8, block_size=16)
        self.receiver = Receiver(self.pool, LAYOUT, engine, transfer_config())
        self.said: deque[Message] = deque()
        self.arrived: Arrived | None = None
        self.stored = np.full((3, 2, 8 * 16, 1, 16), np.nan, dtype=np.float32)

    def hear(self, message: Any, now: float, *, damaged: bool = False) -> None:
        match message:
            case Reserve():
                self._note(self.receiver.reserve("p-0|1", message, now))
                self._note(self.receiver.grant(8, now))
            case LeaseRenew():
                self._note(self.receiver.renew("p-0|1", message, now))
            case KvFrame():
                self._frame(message, now, damaged)
            case TransferEnd():
                self._note(self.receiver.end(message, now))
            case _:
                raise AssertionError(f"a prefill worker does not say {message!r}")

    def _frame(self, frame: KvFrame, now: float, damaged: bool) -> None:
        payload = bytearray(payload_of(frame))
        payload[7] ^= damaged
        found = frame_checksum(frame, payload)
        instructions = self.receiver.frame(frame, len(payload), found, now)
        self._note(instructions)
        for write in instructions:
            if not isinstance(write, ToPrefill):
                layers = slice(frame.layer_start, frame.layer_start + frame.num_layers)
                positions = np.arange(frame.token_start, frame.token_start + frame.num_tokens)
                slots = np.array(write.block_table)[positions // 16] * 16 + positions % 16
                rows = np.frombuffer(payload, np.float32)
                shape = (frame.num_layers, 2, frame.num_tokens, 1, 16)
                self.stored[layers, :, slots] = rows.reshape(shape)
                self._note(self.receiver.written(frame, 0.0, "", now))

    def _note(self, instructions: Any) -> None:
        for instruction in instructions:
            if isinstance(instruction, ToPrefill):
                self.said.append(instruction.message)
            elif isinstance(instruction, Arrived):
                self.arrived = instruction


@pytest.mark.parametrize("name", SCENES)
def test_a_prefill_worker_of_version_1_hands_over(name: str) -> None:
    end = DecodeEnd()
    num_damaged = 1 if name != "hand_over" else 0
    now = 0.0
    for who, said in RECORDED[name]:
        if who == "event":
            now = 4.0 if said == "renew" else now
        elif who == "decode":
            answer = end.said.popleft()
            assert without_reason(as_version_1_reads(answer, said)) == without_reason(plain(said))
        else:
            message = decode(bytes.fromhex(said))
            is_damaged = bool(num_damaged) and getattr(message, "index", 0) == 1
            num_damaged -= is_damaged
            end.hear(message, now, damaged=is_damaged)
    assert not end.said, "and nothing that such a peer does not know"
    assert end.arrived is not None
    assert (end.arrived.num_tokens, end.arrived.complete_from) == (NUM_TOKENS, 0)
    positions = np.arange(NUM_TOKENS)
    slots = np.array(end.arrived.blocks)[positions // 16] * 16 + positions % 16
    assert np.array_equal(end.stored[:, :, slots], KV)
    assert (end.receiver.num_open, end.pool.num_free) == (0, 8 - len(end.arrived.blocks))


LAST = PushEnd(DECODE, TransferEnd("last/0", 1, 0, 0, ()))
"""Put behind the jobs that are tested."""


class Outlet:
    kind = "zeromq"

    def __init__(self) -> None:
        self.parts: list[tuple[bytes, memoryview | None]] = []
        self.is_done = asyncio.Event()

    async def room(self, num_bytes: int) -> memoryview | None:
        return None

    async def send(self, head: bytes, payload: memoryview | None) -> None:
        if decode(head) == LAST.end:
            self.is_done.set()
        else:
            self.parts.append((head, payload))


class PrefillEnd:
    """This build's sender and pusher; blocks of 8."""

    def __init__(self) -> None:
        self.pool = BlockPool(8, 8)
        self.blocks = self.pool.allocate(T, 3)
        self.sender = Sender(self.pool, LAYOUT, transfer_config())
        self.said: deque[tuple[str, Message]] = deque()
        self.closed: SendClosed | None = None

    async def hear(self, message: Any, now: float) -> None:
        match message:
            case Granted():
                await self.do(self.sender.granted(message, DECODE, now))
            case TransferNack():
                await self.do(self.sender.nacked(message, now))
            case TransferAck():
                await self.do(self.sender.acked(message, now))
            case _:
                raise AssertionError(f"a decode worker does not say {message!r}")

    async def do(self, instructions: Any) -> None:
        jobs = []
        for instruction in instructions:
            if isinstance(instruction, ToDecode):
                self.said.append(("prefill", instruction.message))
            elif isinstance(instruction, PushKv | PushEnd):
                jobs.append(instruction)
            elif isinstance(instruction, SendClosed):
                self.closed = instruction
        for head, payload in await pushed(jobs):
            message = decode(head)
            if isinstance(message, KvFrame):
                assert payload == payload_of(message)
            self.said.append(("kv", message))


async def pushed(jobs: list[PushKv | PushEnd]) -> list[tuple[bytes, memoryview | None]]:
    outlet = Outlet()
    pusher = KvPusher(LAYOUT, 4_096, lambda table, cut, room: payload_of(cut))
    for job in (*jobs, LAST):
        pusher.put(job)
    task = asyncio.get_running_loop().create_task(pusher.run(outlet))
    async with asyncio.timeout(20.0):
        await outlet.is_done.wait()
    task.cancel()
    await asyncio.wait([task])
    return outlet.parts


@pytest.mark.parametrize("name", SCENES)
async def test_a_decode_worker_of_version_1_is_handed_to(name: str) -> None:
    end = PrefillEnd()
    sender = end.sender
    await end.do(sender.begin(T, DECODE, body("r", NUM_TOKENS), 0.0))
    now = 0.0
    for who, said in RECORDED[name]:
        if who == "decode":
            await end.hear(decode(bytes.fromhex(said)), now)
        elif said == "computed 12":
            await end.do(sender.computed(T, tuple(end.blocks), 12, now))
        elif said == "renew":
            now = 4.0
            await end.do(sender.tick(now))
        elif said == "computed 20":
            await end.do(sender.computed(T, tuple(end.blocks), NUM_TOKENS, now))
        elif said == "prefill_done":
            end.pool.hand_over(T, owner_name(T), end.blocks)
            await end.do(sender.prefill_done(T, (7,), now))
        elif who != "event":
            ours, message = end.said.popleft()
            assert ours == who
            assert as_version_1_reads(message, said) == plain(said)
    assert not end.said, "and nothing that such a peer does not know"
    assert end.closed == SendClosed(T)
    assert (sender.num_open, end.pool.num_free) == (0, 8)


def without_reason(fields: list[Any]) -> list[Any]:
    """Of a refusal, which is for people."""
    return fields[:-1] if fields[0] == "TransferNack" else fields
