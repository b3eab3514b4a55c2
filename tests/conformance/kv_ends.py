"""Both ends of a KV link, by name of the transport, for the conformance suite and its peers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
import zmq.asyncio

from baton.protocol.messages import KvOffer
from kv_transfer.transports.contract import KvReceiver, KvSender, LinkLost, OnPart
from kv_transfer.transports.cuda_driver import CudaDriver
from kv_transfer.transports.make import make_receiver, make_sender
from kv_transfer.transports.zeromq import TCP, CurveKeys, ZeroMqReceiver, ZeroMqSender

TIMEOUT_S = 30.0
FRAME_BYTES = 2**20
CURVE = "zeromq_curve"
KINDS = ["in_process", "shared_memory", "zeromq", "zeromq_ipc", CURVE, "gloo"]
BETWEEN_PROCESSES = [
    *(kind for kind in KINDS if kind not in ("in_process", CURVE)),
    pytest.param("cuda_ipc", marks=pytest.mark.gpu),
]
"""CUDA IPC works between processes alone."""
TELLS_LOSS = [*(kind for kind in KINDS if not kind.startswith("zeromq")), "cuda_ipc"]
"""ZeroMQ connects again without a word."""

RECEIVER_KEYS, SENDER_KEYS = CurveKeys(*zmq.curve_keypair()), CurveKeys(*zmq.curve_keypair())


def sender_of(
    kind: str, context: zmq.asyncio.Context, max_frame_bytes: int = FRAME_BYTES
) -> KvSender:
    if kind == CURVE:
        return ZeroMqSender(context, TCP, max_frame_bytes, SENDER_KEYS)
    return make_sender(kind, context, max_frame_bytes)


def receiver_of(kind: str, context: zmq.asyncio.Context, on_part: OnPart) -> KvReceiver:
    if kind == CURVE:
        return ZeroMqReceiver(context, TCP, on_part, RECEIVER_KEYS)
    return make_receiver(kind, context, on_part)


@dataclass
class Received:
    """What came; ``gate`` closed makes the reader slow."""

    parts: list[tuple[bytes, bytes | None]] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    async def on_part(self, head: memoryview, payload: memoryview | None) -> None:
        await self.gate.wait()
        self.parts.append((bytes(head), None if payload is None else bytes(payload)))

    @property
    def heads(self) -> list[bytes]:
        return [head for head, _ in self.parts]


@contextlib.asynccontextmanager
async def running(*coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    tasks = [asyncio.get_running_loop().create_task(c) for c in coroutines]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            assert task.cancelled(), task


@dataclass
class Ends:
    kind: str
    context: zmq.asyncio.Context
    receiver: KvReceiver
    received: Received
    offer: KvOffer
    senders: list[KvSender] = field(default_factory=list)

    async def connect(self, max_frame_bytes: int = FRAME_BYTES) -> KvSender:
        sender = sender_of(self.kind, self.context, max_frame_bytes)
        self.senders.append(sender)
        await sender.connect(self.offer)
        return sender

    async def end(self, sender: KvSender) -> None:
        """Say that this was all, and wait until all has come."""
        await sender.send(b"end", None)
        await until(lambda: b"end" in self.received.heads, "the last part")


@contextlib.asynccontextmanager
async def bound(kind: str) -> AsyncIterator[Ends]:
    """A receiver that is bound; running it is the test's. Afterwards nothing is left."""
    context = zmq.asyncio.Context()
    received = Received()
    receiver = receiver_of(kind, context, received.on_part)
    ends = Ends(kind, context, receiver, received, receiver.bind("127.0.0.1"))
    try:
        yield ends
    finally:
        for sender in ends.senders:
            sender.close()
        receiver.close()
        context.destroy(linger=0)


@contextlib.asynccontextmanager
async def linked(
    kind: str, max_frame_bytes: int = FRAME_BYTES
) -> AsyncIterator[tuple[Ends, KvSender]]:
    async with bound(kind) as ends, running(ends.receiver.run()):
        yield ends, await ends.connect(max_frame_bytes)


async def until(condition: Callable[[], bool], what: str) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + TIMEOUT_S
    while not condition():
        assert loop.time() < end, f"not within {TIMEOUT_S} s: {what}"
        await asyncio.sleep(0.005)


async def put(sender: KvSender, head: bytes, payload: bytes) -> None:
    """As a pusher does: into the transport's memory where it has any."""
    room = await sender.room(len(payload))
    if room is None:
        await sender.send(head, memoryview(payload))
    else:
        room[:] = payload
        await sender.send(head, room)


async def lost(sender: KvSender) -> LinkLost:
    """The error with which a link ends whose peer is gone."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            try:
                await put(sender, b"into the void", b"x" * 1_000)
            except LinkLost as exc:
                return exc
            await asyncio.sleep(0.005)


@dataclass(frozen=True)
class Holdings:
    """What this process holds of the operating system, and of the event loop."""

    fds: int
    threads: tuple[str, ...]
    tasks: int
    shared: tuple[str, ...]

    @classmethod
    def now(cls) -> Holdings:
        gc.collect()
        maps = Path("/proc/self/maps").read_text().splitlines()
        return cls(
            fds=len(list(Path("/proc/self/fd").iterdir())),
            threads=tuple(sorted(t.name for t in threading.enumerate())),
            tasks=len(asyncio.all_tasks()),
            shared=tuple(
                sorted(
                    [line for line in maps if "baton-kv" in line]
                    + [path.name for path in Path("/dev/shm").glob("*baton-kv*")]
                )
            ),
        )

    def are_within(self, before: Holdings) -> bool:
        """A descriptor of an earlier test may have been closing when ``before`` was taken."""
        return self.fds <= before.fds and replace(self, fds=before.fds) == before


_warm: set[str] = set()


async def warm_up() -> None:
    """Once in a process: pyzmq opens a context of its own when it first sends without a copy,
    and torch two descriptors with its first group."""
    if torch.cuda.is_available():
        CudaDriver()
    for kind in {"zeromq", "gloo"} - _warm:
        async with linked(kind) as (ends, sender):
            await put(sender, b"warm", b"x" * FRAME_BYTES)
            await ends.end(sender)
        await until(
            lambda: not any("kv-p2p" in t.name for t in threading.enumerate()), "its threads ended"
        )
        _warm.add(kind)


@contextlib.asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """Descriptors, threads, tasks, mappings and shared memory are what they were before."""
    await warm_up()
    before = Holdings.now()
    yield
    await until(
        lambda: Holdings.now().are_within(before), f"back to {before}, now {Holdings.now()}"
    )
