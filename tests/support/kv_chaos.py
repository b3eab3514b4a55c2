"""Clusters whose decode workers are reached through a proxy that knows hand-overs and harms them.

The proxy stands before a decode worker's two sockets: the one for messages, where room is asked
for and granted and ends are acknowledged, and the one for KV. It forwards whole messages, so a
``Fault`` can name the very step of the protocol that it hits. Between the proxy and the worker
are two byte-level relays whose connections can be reset.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from baton.messaging import sockets
from baton.messaging.codec import decode, encode
from baton.protocol.config import ClusterConfig
from baton.protocol.messages import (
    AnyMessage,
    Granted,
    HelloReply,
    KvFrame,
    KvOffer,
    Reserve,
    TransferAck,
    TransferEnd,
)
from baton.protocol.spec import WorkerInfo, WorkerSpec
from cluster.launcher import Loaded
from cluster.process_launcher import ProcessLauncher, ProcessWorker
from kv_transfer.transports.contract import QUEUE_FRAMES
from tests.support.clusters import Cluster, running_cluster
from tests.support.relay import Relay, relay_to

MIDDLE = 1
DELAY_S = 0.4
OVERTAKEN_S = 2.0
"""What is held back for another to overtake it waits no longer, should none come."""


class Step(StrEnum):
    RESERVE = "reserve"
    GRANT = "grant"
    FIRST = "first frame"
    MIDDLE = "middle frame"
    END = "end"
    ACK = "ack"


class Harm(StrEnum):
    LOSE = "lose"
    DUPLICATE = "duplicate"
    REORDER = "reorder"
    DELAY = "delay"
    CUT = "cut"
    CORRUPT_HEADER = "corrupt header"
    CORRUPT_PAYLOAD = "corrupt payload"


OF_FRAMES = (Step.FIRST, Step.MIDDLE)
OF_KV = (*OF_FRAMES, Step.END)


def step_of(message: AnyMessage) -> Step | None:
    match message:
        case Reserve():
            return Step.RESERVE
        case Granted():
            return Step.GRANT
        case KvFrame(index=0):
            return Step.FIRST
        case KvFrame(index=index) if index == MIDDLE:
            return Step.MIDDLE
        case TransferEnd():
            return Step.END
        case TransferAck():
            return Step.ACK
    return None


@dataclass
class Script:
    """What is to happen, once, to the next message of ``step``; and what did.

    act: done before that message goes on. block: kinds of messages that are lost until further
    notice. bytes_per_s: of the KV link; 0 does not hold it up.
    """

    step: Step | None = None
    harm: Harm | None = None
    act: Callable[[], None] | None = None
    block: tuple[type, ...] = ()
    bytes_per_s: float = 0.0
    num_harmed: int = 0
    num_blocked: int = 0
    watch: Callable[[str, AnyMessage], None] | None = None
    """Told of each message to or from a peer, by its id, before it goes on."""
    frames: list[KvFrame] = field(default_factory=list)
    """Heads of all frames that were forwarded as they came."""
    messages: Counter[str] = field(default_factory=Counter)

    def arm(
        self, step: Step, harm: Harm | None = None, act: Callable[[], None] | None = None
    ) -> None:
        assert self.step is None, "one fault at a time"
        self.step, self.harm, self.act = step, harm, act
        self.num_harmed = 0
        self.frames.clear()

    def take(self, message: AnyMessage) -> tuple[Harm | None, Callable[[], None] | None] | None:
        if self.step is None or step_of(message) is not self.step:
            return None
        self.step = None
        self.num_harmed += 1
        return self.harm, self.act


Forward = Callable[[list[bytes]], Awaitable[object]]


class _Way:
    """One direction of one plane: messages in, in order, as they came or harmed."""

    def __init__(
        self, script: Script, forward: Forward, cut: Callable[[], None], head: int, *, is_kv: bool
    ) -> None:
        """head: which part of a message says what it is."""
        self._script, self._forward, self._cut = script, forward, cut
        self._head, self._is_kv = head, is_kv
        self._held: list[bytes] | None = None
        self._held_since = 0.0

    async def put(self, parts: list[bytes]) -> None:
        script, message = self._script, decode(parts[self._head])
        script.messages[type(message).__name__] += 1
        if isinstance(message, script.block):
            script.num_blocked += 1
            return
        if isinstance(message, KvFrame):
            script.frames.append(message)
        if script.bytes_per_s and self._is_kv:
            await asyncio.sleep(sum(map(len, parts)) / script.bytes_per_s)
        harm, act = script.take(message) or (None, None)
        if act is not None:
            act()
        if harm is Harm.REORDER:
            self._held, self._held_since = parts, asyncio.get_running_loop().time()
            return
        for changed in await self._harmed(harm, parts, message):
            await self._forward(changed)
        await self.release()

    async def _harmed(
        self, harm: Harm | None, parts: list[bytes], message: AnyMessage
    ) -> list[list[bytes]]:
        match harm:
            case Harm.LOSE:
                return []
            case Harm.DUPLICATE:
                return [parts, parts]
            case Harm.DELAY:
                await asyncio.sleep(DELAY_S)
            case Harm.CUT:
                self._cut()
            case Harm.CORRUPT_HEADER:
                return [[*parts[: self._head], _other_head(message), *parts[self._head + 1 :]]]
            case Harm.CORRUPT_PAYLOAD:
                return [[*parts[:-1], _flipped(parts[-1])]]
        return [parts]

    async def release(self, *, only_after_s: float = 0.0) -> None:
        now = asyncio.get_running_loop().time()
        if self._held is not None and now - self._held_since >= only_after_s:
            held, self._held = self._held, None
            await self._forward(held)


def _other_head(message: AnyMessage) -> bytes:
    """Decodes, and says something else: one bit of one field is another."""
    assert isinstance(message, KvFrame | TransferEnd)
    if isinstance(message, KvFrame):
        changed = {"token_start": message.token_start ^ 1}
        return encode(msgspec.structs.replace(message, **changed))
    (token_id,) = message.token_ids
    return encode(msgspec.structs.replace(message, token_ids=(token_id ^ 1,)))


def _flipped(payload: bytes) -> bytes:
    data = bytearray(payload)
    data[len(data) // 2] ^= 0x10
    return bytes(data)


class DecodeProxy:
    """``serve`` before using ``info``, which is what everyone is to believe of the worker."""

    def __init__(self, info: WorkerInfo, script: Script, *, through_proxy: bool) -> None:
        """through_proxy: whether KV goes through here as well, by ZeroMQ."""
        self._script = script
        self._through_proxy = through_proxy
        self._context = zmq.asyncio.Context()
        self._sockets: list[zmq.asyncio.Socket] = []
        self._front = self._socket(zmq.ROUTER)
        self._front.setsockopt(zmq.ROUTER_HANDOVER, 1)
        address = sockets.bind(self._front, "127.0.0.1")
        self._kv_in = self._socket(zmq.PULL, QUEUE_FRAMES)
        self._kv_address = sockets.bind(self._kv_in, "127.0.0.1")
        self._kv_out: zmq.asyncio.Socket | None = None
        self._backs: dict[bytes, zmq.asyncio.Socket] = {}
        self._worker = info
        self.info = msgspec.structs.replace(info, address=address)
        self._relays: list[Relay] = []
        self._stack = contextlib.AsyncExitStack()
        self._group = asyncio.TaskGroup()

    def _socket(self, kind: int, queue_frames: int = 0) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        self._sockets.append(socket)
        sockets.configure(socket, queue_frames=queue_frames, max_part_bytes=sockets.MAX_PART_BYTES)
        return socket

    def cut(self) -> None:
        for relay in self._relays:
            relay.cut()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[DecodeProxy]:
        task = asyncio.ensure_future(self._serve())
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()
            self._context.term()

    async def _serve(self) -> None:
        async with contextlib.AsyncExitStack() as self._stack:
            try:
                async with asyncio.TaskGroup() as self._group:
                    self._message_relay = await self._relayed(self._worker.address)
                    self._group.create_task(self._up())
                    self._group.create_task(self._kv())
                    await asyncio.get_running_loop().create_future()
            finally:  # Before the relays end: an open socket would connect to them again.
                for socket in self._sockets:
                    socket.close(linger=0)

    async def _relayed(self, address: str) -> str:
        relay = await self._stack.enter_async_context(relay_to(address.removeprefix("tcp://")))
        self._relays.append(relay)
        return f"tcp://{relay.address}"

    async def _up(self) -> None:
        """To the worker: a socket of its own for each peer, that bears the peer's name."""
        ways: dict[bytes, _Way] = {}
        while True:
            who, body = await self._front.recv_multipart()
            if who not in self._backs:
                back = self._backs[who] = self._socket(zmq.DEALER)
                back.setsockopt(zmq.ROUTING_ID, who)
                sockets.connect(back, self._message_relay)
                ways[who] = self._way(back.send_multipart, 0)
                self._group.create_task(self._down(who, back))
            self._tell(who, decode(body))
            await ways[who].put([body])

    async def _down(self, who: bytes, back: zmq.asyncio.Socket) -> None:
        way = self._way(self._front.send_multipart, 1)
        while True:
            (body,) = await back.recv_multipart()
            message = decode(body)
            if isinstance(message, HelloReply) and not message.refusal:
                body = encode(await self._redirected(message))
            self._tell(who, message)
            await way.put([who, body])

    def _tell(self, who: bytes, message: AnyMessage) -> None:
        if self._script.watch is not None:
            self._script.watch(who.decode().partition("|")[0], message)

    def _way(self, forward: Forward, head: int, *, is_kv: bool = False) -> _Way:
        way = _Way(self._script, forward, self.cut, head, is_kv=is_kv)
        self._group.create_task(_release(way))
        return way

    async def _redirected(self, reply: HelloReply) -> HelloReply:
        if not self._through_proxy:
            return reply
        if self._kv_out is None:
            self._kv_out = self._socket(zmq.PUSH, QUEUE_FRAMES)
            sockets.connect(self._kv_out, await self._relayed(reply.kv_address))
        offers = (KvOffer("zeromq", self._kv_address),)
        return msgspec.structs.replace(reply, kv_address=self._kv_address, kv_offers=offers)

    async def _kv(self) -> None:
        async def forward(parts: list[bytes]) -> None:
            assert self._kv_out is not None
            await self._kv_out.send_multipart(parts)

        way = self._way(forward, 0, is_kv=True)
        while True:
            await way.put(await self._kv_in.recv_multipart())


async def _release(way: _Way) -> None:
    while True:
        await asyncio.sleep(OVERTAKEN_S / 4)
        await way.release(only_after_s=OVERTAKEN_S)


class _ProxiedWorker:
    def __init__(self, worker: ProcessWorker, info: WorkerInfo) -> None:
        self._worker = worker
        self.info = info

    async def wait(self) -> str:
        return await self._worker.wait()

    async def stop(self) -> None:
        await self._worker.stop()


class ChaosLauncher(ProcessLauncher):
    """Decode workers are announced by their proxies' addresses."""

    module = "tests.support.kv_witness"

    def __init__(self, log_dir: Path, script: Script, *, through_proxy: bool) -> None:
        super().__init__(log_dir)
        self._script = script
        self._through_proxy = through_proxy
        self._stack = contextlib.AsyncExitStack()

    async def __aexit__(self, *exc: object) -> None:
        await super().__aexit__(*exc)
        await self._stack.aclose()

    async def start_worker(  # type: ignore[override]
        self, spec: WorkerSpec, loaded: Loaded
    ) -> ProcessWorker | _ProxiedWorker:
        worker = await super().start_worker(spec, loaded)
        if spec.pool.role != "decode":
            return worker
        proxy = DecodeProxy(worker.info, self._script, through_proxy=self._through_proxy)
        await self._stack.enter_async_context(proxy.serving())
        return _ProxiedWorker(worker, proxy.info)


@contextlib.asynccontextmanager
async def harmed_cluster(
    config: ClusterConfig,
    log_dir: Path,
    *,
    supervise: bool = False,
    through_proxy: bool = True,
) -> AsyncIterator[tuple[Cluster, Script]]:
    script = Script()
    launcher = ChaosLauncher(log_dir, script, through_proxy=through_proxy)
    async with running_cluster(config, log_dir, supervise=supervise, made=launcher) as cluster:
        yield cluster, script
