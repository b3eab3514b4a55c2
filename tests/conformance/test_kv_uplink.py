"""Which transport a peer is reached by, and what happens when it is lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
import zmq.asyncio

from baton.protocol.errors import IncompatiblePeer
from baton.protocol.messages import HelloReply, KvOffer
from kv_transfer.transports import uplink as uplink_module
from kv_transfer.transports.choose import offers_of
from kv_transfer.transports.contract import KvSender, OnPart
from kv_transfer.transports.make import Receivers, make_sender
from kv_transfer.transports.uplink import Uplink
from tests.conformance.kv_ends import nothing_left, running, until

FRAME_BYTES = 2**20
GONE = KvOffer("shared_memory", "baton-kv-of-another-host")


@dataclass
class World:
    """One decode worker's receivers, and a prefill worker's way to it."""

    wanted: str
    context: zmq.asyncio.Context
    parts: list[tuple[str, bytes, int]] = field(default_factory=list)
    made: list[KvSender] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.receivers = Receivers(self.wanted, self.context, self.handler)
        self.offers = self.receivers.bind("127.0.0.1")
        self.uplink = Uplink("d-0", self.wanted, self.make)

    def make(self, kind: str) -> KvSender:
        self.made.append(make_sender(kind, self.context, FRAME_BYTES))
        return self.made[-1]

    def handler(self, kind: str) -> OnPart:
        async def on_part(head: memoryview, payload: memoryview | None) -> None:
            self.parts.append((kind, bytes(head), 0 if payload is None else payload.nbytes))

        return on_part

    async def send(self, head: bytes) -> None:
        room = await self.uplink.room(1_000)
        await self.uplink.send(head, memoryview(bytes(1_000)) if room is None else room)

    def without(self, *kinds: str) -> tuple[KvOffer, ...]:
        return tuple(offer for offer in self.offers if offer.transport not in kinds)


@contextlib.asynccontextmanager
async def world(wanted: str) -> AsyncIterator[World]:
    context = zmq.asyncio.Context()
    made = World(wanted, context)
    try:
        async with running(made.receivers.run(), made.uplink.run()):
            yield made
            made.uplink.close()
    finally:
        made.uplink.close()
        made.receivers.close()
        context.destroy(linger=0)


async def test_auto_takes_the_nearest_way_there_is() -> None:
    async with nothing_left(), world("auto") as w:
        ways = []
        for offers in (
            w.offers,
            w.without("in_process"),
            (GONE, *w.without("in_process", "shared_memory")),
            w.without("in_process", "shared_memory"),
            (KvOffer("of-the-future", "x"), *w.without("in_process", "shared_memory")),
        ):
            link = Uplink("d-0", "auto", w.make)
            await link.open(offers)
            ways.append((link.kind, link.reason))
            link.close()
        kinds = [kind for kind, _ in ways]
        assert kinds == ["in_process", "shared_memory", "zeromq", "zeromq", "zeromq"]
        assert ways[0][1] == "both ends are in one process"
        assert ways[1][1] == "same host: the peer answered on a socket of this kernel"
        assert ways[2][1].startswith("no shared_memory with baton-kv-of-another-host: ")
        assert ways[2][1].endswith("; nothing nearer reaches the peer")
        assert ways[3][1] == "nothing nearer reaches the peer"


@pytest.mark.parametrize("kind", ["shared_memory", "zeromq", "zeromq_ipc", "gloo"])
async def test_a_forced_transport_carries_every_byte(kind: str) -> None:
    async with nothing_left(), world(kind) as w:
        await w.uplink.open(w.offers)
        for number in range(10):
            await w.send(b"%d" % number)
        await until(lambda: len(w.parts) == 10, "all parts")
        assert {way for way, _, _ in w.parts} == {kind}
        assert w.uplink.bytes_by_kind() == w.receivers.bytes_by_kind() == {kind: 10_000}
        assert w.uplink.reason == f"asked for by kv_transfer.transport: {kind}"


@pytest.mark.parametrize(
    ("wanted", "offers", "message"),
    [
        (
            "shared_memory",
            (KvOffer("zeromq", "tcp://127.0.0.1:1"),),
            "no KV link to d-0 by shared_memory: it offers zeromq; "
            "set kv_transfer.transport to auto or to zeromq",
        ),
        ("shared_memory", (GONE,), "no KV link to d-0 by shared_memory: no shared_memory with"),
        ("zeromq", (), "no KV link to d-0 by zeromq: it offers nothing"),
        ("auto", (), "no KV link to d-0 by auto: it offers nothing"),
        ("auto", (KvOffer("zeromq", "nonsense"),), "'nonsense' is no address to connect to"),
    ],
)
async def test_what_cannot_be_had_is_refused_with_the_way_out(
    wanted: str, offers: tuple[KvOffer, ...], message: str
) -> None:
    async with nothing_left(), world(wanted) as w:
        with pytest.raises(IncompatiblePeer) as refusal:
            await w.uplink.open(offers)
        assert message in refusal.value.message


def test_a_peer_of_version_1_is_reached_by_zeromq() -> None:
    old = HelloReply("", 1, "d-0", "1", "decode", "fp", "tcp://127.0.0.1:5")
    assert offers_of(old) == (KvOffer("zeromq", "tcp://127.0.0.1:5"),)
    assert offers_of(HelloReply("", 1, "p-0", "1", "prefill", "fp")) == ()


@pytest.mark.parametrize("kind", ["shared_memory", "gloo"])
async def test_zeromq_carries_while_a_lost_link_is_made_anew(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uplink_module, "RETRY_S", 0.3)
    async with nothing_left(), world(kind) as w:
        await w.uplink.open(w.offers)
        await w.send(b"before")
        await until(lambda: len(w.parts) == 1, "by the link that was chosen")
        w.made[0].close()
        await w.send(b"meanwhile")
        assert w.uplink.kind == "zeromq"
        assert w.uplink.reason == f"{kind} was lost (closed) and is being made anew"
        await until(lambda: len(w.parts) == 2, "by ZeroMQ")
        number = 0
        while w.uplink.kind != kind:
            await w.send(b"%d" % number)
            await asyncio.sleep(0.02)
            number += 1
        assert w.uplink.reason == f"asked for by kv_transfer.transport: {kind} (made anew)"
        await w.send(b"after")
        await until(lambda: w.parts[-1][1] == b"after", "by the link that was made anew")
        assert [way for way, _, _ in (w.parts[0], w.parts[1], w.parts[-1])] == [
            kind,
            "zeromq",
            kind,
        ]
        assert sum(w.uplink.bytes_by_kind().values()) == 1_000 * (number + 3)
        assert [sender.kind for sender in w.made] == [kind, "zeromq", kind]


@pytest.mark.parametrize("kind", ["shared_memory", "gloo"])
async def test_a_frame_in_a_lost_links_memory_goes_by_the_next_way(kind: str) -> None:
    """``room`` was the transport's own, which is lost before ``send``; its bytes are not."""
    async with nothing_left(), world(kind) as w:
        await w.uplink.open(w.offers)
        room = await w.uplink.room(1_000)
        assert room is not None
        room[:] = b"x" * 1_000
        w.made[0].close()
        await w.uplink.send(b"head", room)
        await until(lambda: w.parts == [("zeromq", b"head", 1_000)], "by ZeroMQ")
        del room
