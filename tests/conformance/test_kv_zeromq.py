"""What only ZeroMQ has: strangers that speak its protocol, and keys."""

from __future__ import annotations

import asyncio

import pytest
import zmq
import zmq.asyncio

from baton.messaging.sockets import MAX_PART_BYTES
from kv_transfer.transports.contract import MAX_HEAD_BYTES, LinkLost
from kv_transfer.transports.zeromq import TCP, CurveKeys, ZeroMqReceiver, ZeroMqSender
from tests.conformance.kv_ends import (
    CURVE,
    FRAME_BYTES,
    RECEIVER_KEYS,
    SENDER_KEYS,
    Received,
    bound,
    linked,
    nothing_left,
    put,
    running,
    until,
)


async def test_parts_of_another_shape_are_dropped() -> None:
    async with nothing_left(), linked("zeromq") as (ends, sender):
        stranger = ends.context.socket(zmq.PUSH)
        stranger.connect(ends.offer.address)
        await stranger.send_multipart([b"a", b"b", b"c"])
        await stranger.send_multipart([b"x" * (MAX_HEAD_BYTES + 1)])
        await until(lambda: ends.receiver.num_dropped == 2, "both are dropped")
        await put(sender, b"good", b"unharmed")
        await ends.end(sender)
        assert ends.received.heads == [b"good", b"end"]
        stranger.close(linger=0)


async def test_a_part_over_the_cap_costs_its_sender_the_connection() -> None:
    async with nothing_left(), linked("zeromq") as (ends, sender):
        stranger = ends.context.socket(zmq.PUSH)
        stranger.connect(ends.offer.address)
        hung_up = stranger.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        await stranger.send_multipart([b"", bytes(MAX_PART_BYTES + 100)])
        async with asyncio.timeout(20.0):
            await hung_up.recv_multipart()
        await put(sender, b"good", b"unharmed")
        await ends.end(sender)
        assert ends.received.heads == [b"good", b"end"]
        stranger.disable_monitor()
        stranger.close(linger=0)


@pytest.mark.parametrize(
    ("given", "said"), [(None, "was given no keys"), (SENDER_KEYS, "no CURVE")]
)
async def test_keys_on_one_side_alone_are_refused(given: CurveKeys | None, said: str) -> None:
    async with nothing_left(), bound(CURVE if given is None else "zeromq") as ends:
        sender = ZeroMqSender(ends.context, TCP, FRAME_BYTES, given)
        with pytest.raises(LinkLost, match=said):
            await sender.connect(ends.offer)
        sender.close()


async def test_who_has_not_the_offered_key_gets_nothing() -> None:
    """Another server at that address, as a man in the middle would be."""
    async with nothing_left():
        context = zmq.asyncio.Context()
        received, other_keys = Received(), CurveKeys(*zmq.curve_keypair())
        impostor = ZeroMqReceiver(context, TCP, received.on_part, other_keys)
        offer = impostor.bind("127.0.0.1")
        promised = type(offer)(offer.transport, offer.address, RECEIVER_KEYS.public.decode())
        sender = ZeroMqSender(context, TCP, FRAME_BYTES, SENDER_KEYS)
        async with running(impostor.run()):
            await sender.connect(promised)
            await put(sender, b"secret", b"x" * 1_000)
            await asyncio.sleep(0.5)
            assert received.parts == []
        sender.close()
        context.destroy(linger=0)
