"""Wire versions N and N-1 speak the lower; whatever else is refused before there is any KV."""

from __future__ import annotations

import pytest
import zmq

from baton.messaging import server as server_module
from baton.messaging.codec import decode
from baton.messaging.link import make_hello
from baton.protocol.messages import (
    OLDEST_WIRE_VERSION,
    WIRE_VERSION,
    Abort,
    Hello,
    HelloReply,
)
from tests.conformance.recorded import LAYOUT, RECORDED, as_version_1_reads, plain
from tests.conformance.test_message_link import (
    Linked,
    answer_of,
    raw_dealer,
    running,
    serving,
    until,
)

IDS = {"prefill": b"p-0|inc-p", "router": b"router-0|inc-r"}


def test_this_build_speaks_two_versions() -> None:
    assert (OLDEST_WIRE_VERSION, WIRE_VERSION) == (1, 2)
    assert LAYOUT.fingerprint(1) == RECORDED["fingerprint"] != LAYOUT.fingerprint(2)


@pytest.mark.parametrize("role", IDS)
async def test_a_peer_of_version_1_is_greeted_in_version_1(role: str) -> None:
    """What it reads of the reply has the form that the recorded one has."""
    async with serving() as (context, served):

        def describe(hello: Hello, version: int) -> HelloReply:
            fingerprint = LAYOUT.fingerprint(version)
            return HelloReply(
                "",
                version,
                "d-0",
                "inc-d",
                "decode",
                fingerprint,
                "tcp://127.0.0.1:5",
                128,
                layout=LAYOUT,
            )

        served.server._describe = describe
        with raw_dealer(context, served.address, IDS[role]) as socket:
            await socket.send(bytes.fromhex(RECORDED["hello"][role]))
            reply = await answer_of(socket)
            assert as_version_1_reads(reply, RECORDED["reply"]["decode"]) == plain(
                RECORDED["reply"]["decode"]
            )
            await socket.send(bytes.fromhex(RECORDED["hand_over"][0][1]))
            await until(lambda: served.messages, "a message of version 1")
        [(peer, message)] = served.messages
        assert (peer.role, peer.version, type(message).__name__) == (role, 1, "Reserve")


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_of_version_1_is_spoken_to_in_version_1(role: str) -> None:
    async with serving() as (context, _):
        socket = context.socket(zmq.ROUTER)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        linked = Linked(context, f"tcp://127.0.0.1:{port}", "router-0", "inc-r")
        linked.link.send(Abort("r", 0))
        async with running(linked.link.run()):
            name, hello = await socket.recv_multipart()
            expected = plain(RECORDED["hello"]["router"])
            expected[2] = WIRE_VERSION
            assert as_version_1_reads(decode(hello), RECORDED["hello"]["router"]) == expected
            await socket.send_multipart([name, bytes.fromhex(RECORDED["reply"][role])])
            await until(lambda: linked.link.is_ready, "greeted")
            assert decode((await socket.recv_multipart())[1]) == Abort("r", 0)
        assert linked.link.version == 1
        [reply] = linked.replies
        assert (reply.version, reply.role, reply.layout) == (1, role, None)
        assert reply.layout_fingerprint == LAYOUT.fingerprint(1)
        socket.close(linger=0)


async def test_a_build_that_knows_later_versions_only_is_refused() -> None:
    async with serving() as (context, served):
        linked = Linked(context, served.address, hello=Hello(3, 3, "p-9", "1", "prefill"))
        linked.link.send(Abort("r", 0))
        async with running(linked.link.run()):
            await until(lambda: linked.replies, "refused")
            assert linked.replies[0].refusal == (
                "no wire version in common: prefill p-9 speaks 3 to 3, the one it greeted 1 to 2; "
                "upgrade the one that was greeted"
            )
            assert not linked.link.is_ready
        assert served.messages == []


async def test_a_peer_of_version_1_is_refused_by_a_build_that_has_left_it_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The refusal is one that it can read."""
    monkeypatch.setattr(server_module, "OLDEST_WIRE_VERSION", 2)
    monkeypatch.setattr(server_module, "WIRE_VERSION", 3)
    async with serving() as (context, served):
        with raw_dealer(context, served.address, IDS["prefill"]) as socket:
            await socket.send(bytes.fromhex(RECORDED["hello"]["prefill"]))
            reply = await answer_of(socket)
            assert isinstance(reply, HelloReply)
            assert reply.refusal == (
                "no wire version in common: prefill p-0 speaks 1 to 1, the one it greeted 2 to 3; "
                "upgrade p-0"
            )
            kinds = [type(field) for field in plain(RECORDED["reply"]["decode"])]
            read = as_version_1_reads(reply, RECORDED["reply"]["decode"])
            assert [type(field) for field in read] == kinds
        assert served.messages == []


async def test_versions_named_the_wrong_way_round_are_refused() -> None:
    async with serving() as (context, served):
        linked = Linked(context, served.address, hello=Hello(2, 1, "p-9", "1", "prefill"))
        async with running(linked.link.run()):
            await until(lambda: linked.replies, "refused")
        assert "p-9 names them the wrong way round" in linked.replies[0].refusal


@pytest.mark.parametrize("version", [0, 3, 2**40])
async def test_a_version_that_was_not_offered_is_not_spoken(version: int) -> None:
    async with serving() as (context, served):
        served.server._describe = lambda hello, _: HelloReply("", version, "w-0", "1", "decode")
        linked = Linked(context, served.address)
        linked.link.send(Abort("r", 0))
        async with running(linked.link.run()):
            await until(lambda: linked.replies, "answered")
            assert linked.replies[0].refusal == (
                f"w-0 wants to speak wire version {version}; 1 to 2 were offered"
            )
            assert (linked.link.is_ready, linked.link.version) == (False, 0)
        assert served.messages == []
        assert make_hello("a", "1", "router") == Hello(1, 2, "a", "1", "router")
