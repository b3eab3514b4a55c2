"""What router and workers rely on between ``Link`` and ``MessageServer``, on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
import zmq
import zmq.asyncio

from baton.messaging import link as link_module
from baton.messaging import server as server_module
from baton.messaging.codec import MAX_MESSAGE_BYTES, decode, encode
from baton.messaging.link import Link, make_hello
from baton.messaging.server import NOT_GREETED, MessageServer, Peer
from baton.messaging.turns import MESSAGES_PER_TURN
from baton.protocol.errors import WireError
from baton.protocol.messages import (
    WIRE_VERSION,
    Abort,
    AnyMessage,
    Hello,
    HelloReply,
    Message,
    RouterAlive,
)
from tests.support.garbage import blobs, payloads
from tests.support.relay import relay_to

TIMEOUT_S = 20.0


class Served:
    """A server with what came in; it answers each Abort with the same Abort."""

    def __init__(self, context: zmq.asyncio.Context) -> None:
        self.server = MessageServer(context, self._describe, self._on_message)
        self.address = self.server.bind("127.0.0.1")
        self.messages: list[tuple[Peer, AnyMessage]] = []

    def _describe(self, hello: Hello, version: int) -> HelloReply:
        return HelloReply("", version, "w-0", "inc-w", "decode", "fp", "tcp://kv", 64)

    def _on_message(self, peer: Peer, message: AnyMessage) -> None:
        self.messages.append((peer, message))
        if isinstance(message, Abort):
            assert self.server.send(peer.key, message)

    def count(self, sender_id: str) -> int:
        return sum(1 for peer, _ in self.messages if peer.sender_id == sender_id)


class Linked:
    """A link with what came back."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        address: str,
        sender_id: str = "router-0",
        incarnation: str = "1",
        hello: Hello | None = None,
    ) -> None:
        self.messages: list[AnyMessage] = []
        self.replies: list[HelloReply] = []
        hello = hello or make_hello(sender_id, incarnation, "router")
        self.link = Link(context, address, hello, self.messages.append, self.replies.append)
        self.link.connect()


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[tuple[zmq.asyncio.Context, Served]]:
    """Afterwards nothing is left: no task, no open socket."""
    tasks = asyncio.all_tasks()
    context = zmq.asyncio.Context()
    served = Served(context)
    try:
        async with running(served.server.run()):
            await asyncio.sleep(0)
            yield context, served
        assert asyncio.all_tasks() == tasks
        assert all(socket.closed for socket in context._sockets)
    finally:
        context.destroy(linger=0)


@contextlib.asynccontextmanager
async def running(*coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    tasks = [asyncio.get_running_loop().create_task(c) for c in coroutines]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks), tasks


async def until(condition: Callable[[], object], what: str) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + TIMEOUT_S
    while not condition():
        assert loop.time() < end, f"not within {TIMEOUT_S} s: {what}"
        await asyncio.sleep(0.005)


@contextlib.contextmanager
def raw_dealer(context: zmq.asyncio.Context, address: str, routing_id: bytes) -> Any:
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.ROUTING_ID, routing_id)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(address)
    try:
        yield socket
    finally:
        socket.close()


async def answer_of(socket: zmq.asyncio.Socket) -> AnyMessage:
    async with asyncio.timeout(TIMEOUT_S):
        return decode((await socket.recv_multipart())[0])


async def test_what_was_sent_before_the_hello_follows_it_in_order() -> None:
    async with serving() as (context, served):
        linked = Linked(context, served.address)
        for number in range(5):
            assert linked.link.send(Abort("r", number))
        async with running(linked.link.run()):
            await until(lambda: linked.link.is_ready, "greeted")
            for number in range(5, 1_000):
                assert linked.link.send(Abort("r", number))
            await until(lambda: len(linked.messages) == 1_000, "all answered")
        expected = [Abort("r", number) for number in range(1_000)]
        assert linked.messages == expected
        assert [message for _, message in served.messages] == expected
        [reply] = linked.replies
        assert reply == HelloReply("", WIRE_VERSION, "w-0", "inc-w", "decode", "fp", "tcp://kv", 64)
        assert served.server.peers("router") == [Peer("router-0", "1", "router", WIRE_VERSION)]
        assert served.server.peers("prefill") == []
        assert not served.server.send("stranger|1", Abort("r", 0))
        assert not served.server.send_to("stranger", Abort("r", 0))


async def test_a_version_from_the_future_is_refused_for_good() -> None:
    async with serving() as (context, served):
        hello = Hello(WIRE_VERSION + 1, WIRE_VERSION + 2, "router-0", "1", "router")
        linked = Linked(context, served.address, hello=hello)
        linked.link.send(Abort("r", 0))
        async with running(linked.link.run()):
            await until(lambda: linked.replies, "refused")
            assert linked.replies[0].refusal == (
                "no wire version in common: router router-0 speaks 3 to 4, the one it greeted "
                "1 to 2; upgrade the one that was greeted"
            )
            assert not linked.link.is_ready
        assert (served.messages, served.server.peers("router")) == ([], [])


async def test_versions_overlap_on_the_lower() -> None:
    async with serving() as (context, served):
        hello = Hello(WIRE_VERSION, WIRE_VERSION + 1, "router-0", "1", "router")
        linked = Linked(context, served.address, hello=hello)
        async with running(linked.link.run()):
            await until(lambda: linked.replies, "greeted")
        assert linked.replies[0].version == WIRE_VERSION


async def test_a_message_before_the_hello_is_dropped_and_asked_for_one() -> None:
    async with serving() as (context, served):
        with raw_dealer(context, served.address, b"router-0|1") as socket:
            await socket.send(encode(Abort("r", 0)))
            answer = await answer_of(socket)
            assert isinstance(answer, HelloReply)
            assert answer.refusal == NOT_GREETED
            assert (served.messages, served.server.num_dropped) == ([], 1)
            await socket.send(encode(make_hello("router-0", "1", "router")))
            await answer_of(socket)
            await socket.send(encode(Abort("r", 1)))
            assert await answer_of(socket) == Abort("r", 1)


async def test_a_link_that_was_forgotten_greets_again_by_itself() -> None:
    async with serving() as (context, served):
        linked = Linked(context, served.address)
        async with running(linked.link.run()):
            await until(lambda: linked.link.is_ready, "greeted")
            served.server.forget("router-0|1")
            linked.link.send(Abort("lost", 0))
            await until(lambda: len(linked.replies) == 2, "greeted again")
            linked.link.send(Abort("r", 1))
            await until(lambda: linked.messages, "answered")
        assert linked.messages == [Abort("r", 1)]


async def test_a_hello_in_anothers_name_is_dropped() -> None:
    async with serving() as (context, served):
        with raw_dealer(context, served.address, b"mallory|1") as socket:
            await socket.send(encode(make_hello("router-0", "1", "router")))
            await until(lambda: served.server.num_dropped == 1, "dropped")
            assert served.server.peers("router") == []


async def test_a_restarted_peer_is_another_peer_and_takes_over() -> None:
    async with serving() as (context, served):
        old = Linked(context, served.address, incarnation="1")
        new = Linked(context, served.address, incarnation="2")
        async with running(old.link.run()):
            await until(lambda: old.link.is_ready, "the first life")
            async with running(new.link.run()):
                await until(lambda: new.link.is_ready, "the second life")
                assert [p.incarnation for p in served.server.peers("router")] == ["2"]
                assert not served.server.send("router-0|1", Abort("to the dead", 0))
                assert served.server.send_to("router-0", Abort("r", 0))
                await until(lambda: new.messages, "told the new one")
        assert old.messages == []


@pytest.mark.parametrize("cut_while_idle", [True, False])
async def test_a_cut_connection_comes_back_with_the_same_peer(cut_while_idle: bool) -> None:
    async with serving() as (context, served):
        target = served.address.removeprefix("tcp://")
        async with relay_to(target) as relay:
            linked = Linked(context, f"tcp://{relay.address}")
            async with running(linked.link.run()):
                await until(lambda: linked.link.is_ready, "greeted")
                for round_ in range(3):
                    if not cut_while_idle:
                        for number in range(200):
                            linked.link.send(RouterAlive(number))
                    relay.cut()
                    number = 0
                    while Abort(f"round-{round_}", number - 1) not in linked.messages:
                        linked.link.send(Abort(f"round-{round_}", number))
                        number += 1
                        await asyncio.sleep(0.02)
                        assert number < TIMEOUT_S / 0.02, "never came back"
            assert len(served.server.peers("router")) == 1


async def test_a_peer_that_returns_before_its_old_connection_died_is_heard() -> None:
    """Two connections with one name: the newer has it, as after a half-open cut."""
    async with serving() as (context, served):
        name = b"router-0|1"
        hello = encode(make_hello("router-0", "1", "router"))
        with raw_dealer(context, served.address, name) as old:
            await old.send(hello)
            await answer_of(old)
            with raw_dealer(context, served.address, name) as new:
                await new.send(hello)
                await answer_of(new)
                await new.send(encode(Abort("r", 0)))
                assert await answer_of(new) == Abort("r", 0)


async def test_garbage_costs_its_sender_the_message_and_nobody_else() -> None:
    async with serving() as (context, served):
        linked = Linked(context, served.address)
        async with running(linked.link.run()):
            await until(lambda: linked.link.is_ready, "greeted")
            host, port = served.address.removeprefix("tcp://").split(":")
            for blob in blobs(seed=1):
                _, writer = await asyncio.open_connection(host, int(port))
                with contextlib.suppress(OSError):
                    writer.write(blob)
                    await writer.drain()
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
            with raw_dealer(context, served.address, b"ghost|0") as socket:
                dropped = len(payloads(seed=1))
                for parts in payloads(seed=1):
                    await socket.send_multipart(parts)
                await until(lambda: served.server.num_dropped >= dropped, "nonsense is counted")
            with raw_dealer(context, served.address, b"\xff\xfe|0") as socket:
                await socket.send(encode(make_hello("x", "0", "router")))
                await until(lambda: served.server.num_dropped > dropped, "a name is ASCII")
            linked.link.send(Abort("r", 0))
            await until(lambda: linked.messages == [Abort("r", 0)], "still served")
        assert {peer.sender_id for peer in served.server.peers("router")} == {"router-0"}


async def test_an_oversized_message_never_reaches_the_process() -> None:
    async with serving() as (context, served):
        linked = Linked(context, served.address)
        async with running(linked.link.run()):
            await until(lambda: linked.link.is_ready, "greeted")
            with raw_dealer(context, served.address, b"fat|0") as socket:
                await socket.send(encode(make_hello("fat", "0", "router")))
                await answer_of(socket)
                await socket.send(b"\xc0" * (MAX_MESSAGE_BYTES + 1))
                linked.link.send(Abort("r", 0))
                await until(lambda: linked.messages, "others are served")
                while not served.count("fat"):
                    await socket.send(encode(RouterAlive(1)))
                    await asyncio.sleep(0.02)
        assert served.server.num_dropped == 0, "the socket refused it before it was read"


async def test_a_flood_leaves_turns_to_others() -> None:
    """While one peer floods, another is answered and the loop runs other tasks."""
    num_messages = 20_000
    async with serving() as (context, served):
        quiet = Linked(context, served.address, "quiet")
        async with running(quiet.link.run()):
            await until(lambda: quiet.link.is_ready, "greeted")
            num_turns = 0

            async def count_turns() -> None:
                nonlocal num_turns
                while True:
                    await asyncio.sleep(0)
                    num_turns += 1

            with raw_dealer(context, served.address, b"flood|0") as socket:
                await socket.send(encode(make_hello("flood", "0", "router")))
                await answer_of(socket)
                flood = encode(RouterAlive(1))
                for _ in range(num_messages):
                    socket.send(flood)
                quiet.link.send(Abort("r", 0))
                async with running(count_turns()):
                    await until(lambda: quiet.messages, "the quiet one is answered")
                    answered_at = served.count("flood")
                    await until(lambda: served.count("flood") == num_messages, "all of it")
            assert answered_at < num_messages, "answered before the flood had passed"
            assert num_turns > num_messages / MESSAGES_PER_TURN / 2


async def test_what_waits_for_a_hello_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "MAX_PENDING_MESSAGES", 3)
    async with serving() as (context, _):
        linked = Linked(context, "tcp://127.0.0.1:1")
        said = [linked.link.send(Abort("r", n)) for n in range(5)]
        assert said == [True, True, True, False, False]
        async with running(linked.link.run()):
            await asyncio.sleep(0)


async def test_the_longest_silent_peer_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_PEERS", 2)
    async with serving() as (context, served):
        links = [Linked(context, served.address, f"router-{n}") for n in range(3)]
        async with running(links[0].link.run(), links[1].link.run()):
            await until(lambda: all(ln.link.is_ready for ln in links[:2]), "both greeted")
            links[0].link.send(Abort("r", 0))
            await until(lambda: links[0].messages, "the first one is heard later")
            async with running(links[2].link.run()):
                await until(lambda: links[2].link.is_ready, "the third greeted")
                kept = {p.sender_id for p in served.server.peers("router")}
                assert kept == {"router-0", "router-2"}


@pytest.mark.parametrize("address", ["", "nonsense", "tcp://", "tcp://127.0.0.1", "udp://x:1"])
async def test_an_address_that_is_none_is_refused_at_once(address: str) -> None:
    async with serving() as (context, _):
        with pytest.raises(WireError, match="is no address"):
            Linked(context, address)


async def test_a_link_that_is_closed_in_any_state_leaves_no_socket() -> None:
    """Also one whose task never had a turn, and one that its own reply handler closes."""
    async with serving() as (context, served):
        early = Linked(context, served.address, "early")
        task = asyncio.get_running_loop().create_task(early.link.run())
        early.link.close()
        task.cancel()
        await asyncio.wait([task])
        late = Linked(context, served.address, "late")
        late.link._on_reply = lambda _: late.link.close()
        async with asyncio.timeout(TIMEOUT_S):
            await late.link.run()
        late.link.close()


async def test_a_reply_that_is_garbage_is_dropped_by_the_link() -> None:
    async with serving() as (context, _):
        socket = context.socket(zmq.ROUTER)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        linked = Linked(context, f"tcp://127.0.0.1:{port}")
        async with running(linked.link.run()):
            name, hello = await socket.recv_multipart()
            assert decode(hello) == make_hello("router-0", "1", "router")
            good: Message = HelloReply("", 1, "w", "i", "decode")
            for parts in ([b""], [b"\xc1"], [encode(good), b"more"], [encode(good)]):
                await socket.send_multipart([name, *parts])
            await until(lambda: linked.link.is_ready, "the good one")
        assert linked.replies == [good]
        assert linked.messages == []
        socket.close(linger=0)
