"""What every KV transport must do, run on each that this machine has.

Order, back-pressure, closing at every point, death of either end, a new incarnation; large and
many parts in ``tests/integration/test_kv_many_parts.py``. Faults and hostile peers of one transport
alone stand in files of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random

import pytest
import zmq.asyncio

from kv_transfer.transports.contract import KvSender, LinkLost
from tests.conformance.kv_ends import (
    FRAME_BYTES,
    KINDS,
    TELLS_LOSS,
    TIMEOUT_S,
    Ends,
    bound,
    linked,
    lost,
    nothing_left,
    put,
    receiver_of,
    running,
    sender_of,
    until,
)

KERNEL_BYTES = 16 * 2**20
"""More than TCP's buffers hold on both ends together; window_bytes does not speak of them."""

pytestmark = pytest.mark.parametrize("kind", KINDS)


@functools.lru_cache(64)
def noise(num_bytes: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(num_bytes)


async def test_parts_arrive_in_order_and_unharmed(kind: str) -> None:
    sizes = [0, 1, 7, 4_096, 65_535, 65_536, 300_001, FRAME_BYTES]
    async with linked(kind) as (ends, sender):
        wanted: list[tuple[bytes, bytes | None]] = []
        for number in range(64):
            head = b"%d" % number * (1 + number * 97 % 5_000)
            if number % 5 == 4:
                wanted.append((head, None))
                await sender.send(head, None)
            else:
                payload = noise(sizes[number % len(sizes)], number)
                wanted.append((head, payload))
                await put(sender, head, payload)
        await ends.end(sender)
        assert ends.received.parts == [*wanted, (b"end", None)]
        num_bytes = sum(len(payload) for _, payload in wanted if payload is not None)
        assert sender.num_bytes == ends.receiver.num_bytes == num_bytes
        assert ends.receiver.num_dropped == 0


async def test_memory_that_is_not_the_transports_own_arrives_too(kind: str) -> None:
    async with linked(kind) as (ends, sender):
        payloads = [noise(100_000, n) for n in range(10)]
        for payload in payloads:
            await sender.send(b"", memoryview(payload))
        await ends.end(sender)
        assert [p for _, p in ends.received.parts[:-1]] == payloads


async def test_room_that_was_not_used_is_there_again(kind: str) -> None:
    """A push that was cancelled between ``room`` and ``send`` gives nothing back."""
    async with linked(kind) as (ends, sender):
        for number in range(20):
            await sender.room(FRAME_BYTES)
            await put(sender, b"%d" % number, noise(1_000 + number, number))
        await ends.end(sender)
        assert [p for _, p in ends.received.parts[:-1]] == [noise(1_000 + n, n) for n in range(20)]


async def test_each_of_two_senders_keeps_its_order(kind: str) -> None:
    async with linked(kind) as (ends, first):
        second = await ends.connect()

        async def send_all(sender: KvSender, name: bytes) -> None:
            for number in range(200):
                await put(sender, name + b"%d" % number, noise(10_000, number))

        await asyncio.gather(send_all(first, b"a"), send_all(second, b"b"))
        await until(lambda: len(ends.received.parts) == 400, "all parts of both")
        for name in (b"a", b"b"):
            own = [(h, p) for h, p in ends.received.parts if h.startswith(name)]
            assert own == [(name + b"%d" % n, noise(10_000, n)) for n in range(200)]


async def test_a_slow_reader_stalls_the_sender_within_its_window(kind: str) -> None:
    async with linked(kind) as (ends, sender):
        ends.received.gate.clear()
        payload = noise(FRAME_BYTES, 0)

        async def send_all() -> None:
            for number in range(100):
                await put(sender, b"%d" % number, payload)

        sending = asyncio.ensure_future(send_all())
        stalled_at = -1
        while stalled_at != sender.num_bytes:
            stalled_at = sender.num_bytes
            await asyncio.sleep(0.3)
        slack = KERNEL_BYTES if kind.startswith("zeromq") else 0
        assert FRAME_BYTES <= stalled_at <= sender.window_bytes + slack
        assert not sending.done()
        ends.received.gate.set()
        await sending
        await ends.end(sender)
        assert ends.received.heads == [*(b"%d" % n for n in range(100)), b"end"]
        assert all(p == payload for _, p in ends.received.parts[:-1])


async def _close_when_made(ends: Ends) -> None:
    sender = sender_of(ends.kind, ends.context)
    sender.close()
    sender.close()


async def _close_when_connected(ends: Ends) -> None:
    sender = await ends.connect()
    sender.close()
    with pytest.raises(LinkLost):
        await sender.room(10)
    with pytest.raises(LinkLost):
        await sender.send(b"late", None)


async def _close_with_room(ends: Ends) -> None:
    sender = await ends.connect()
    room = await sender.room(FRAME_BYTES)
    sender.close()
    if room is not None:
        room[:4] = b"late"  # By a pusher that does not know yet.
    with pytest.raises(LinkLost):
        await sender.send(b"late", memoryview(b"late") if room is None else room)


async def _close_while_it_waits(ends: Ends) -> None:
    """As its owner does: close, then cancel the task that sends."""
    ends.received.gate.clear()
    sender = await ends.connect()

    async def send_forever() -> None:
        while True:
            await put(sender, b"part", noise(FRAME_BYTES, 0))

    sending = asyncio.ensure_future(send_forever())
    stalled_at = -1
    while stalled_at != sender.num_bytes or not stalled_at:
        stalled_at = sender.num_bytes
        await asyncio.sleep(0.1)
    sender.close()
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    ends.received.gate.set()


async def _cancel_in_the_middle(ends: Ends) -> None:
    """A sender that is cancelled anywhere and closed leaves the others whole."""
    sender = await ends.connect()

    async def send_forever() -> None:
        while True:
            await put(sender, b"x" * 100_000, noise(FRAME_BYTES, 0))

    sending = asyncio.ensure_future(send_forever())
    await until(lambda: sender.num_bytes > 0, "something was sent")
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    sender.close()


@pytest.mark.parametrize(
    "close",
    [
        _close_when_made,
        _close_when_connected,
        _close_with_room,
        _close_while_it_waits,
        _cancel_in_the_middle,
    ],
)
async def test_a_sender_may_end_at_any_point(kind: str, close: object) -> None:
    assert callable(close)
    async with nothing_left(), bound(kind) as ends, running(ends.receiver.run()):
        await close(ends)
        ends.received.gate.set()
        other = await ends.connect()
        await put(other, b"other", b"unharmed")
        await ends.end(other)
        assert (b"other", b"unharmed") in ends.received.parts
        assert b"late" not in ends.received.heads


async def test_a_receiver_may_end_before_it_ran(kind: str) -> None:
    async with nothing_left():
        context = zmq.asyncio.Context()
        receiver_of(kind, context, _never).close()
        receiver = receiver_of(kind, context, _never)
        receiver.bind("127.0.0.1")
        receiver.close()
        receiver.close()
        context.destroy(linger=0)


async def _never(head: memoryview, payload: memoryview | None) -> None:
    raise AssertionError("nothing was sent")


async def test_a_receiver_may_end_while_it_reads(kind: str) -> None:
    """Its handler is in the middle of a part, the sender waits for room."""
    async with nothing_left(), bound(kind) as ends:
        ends.received.gate.clear()
        sending: asyncio.Future[None] | None = None
        async with running(ends.receiver.run()):
            sender = await ends.connect()

            async def send_until_lost() -> None:
                while True:
                    await put(sender, b"part", noise(FRAME_BYTES, 0))

            sending = asyncio.ensure_future(send_until_lost())
            await until(lambda: sender.num_bytes > 0, "something was sent")
            await asyncio.sleep(0.1)
        if kind in TELLS_LOSS:
            async with asyncio.timeout(TIMEOUT_S):
                with pytest.raises(LinkLost):
                    await sending
        else:
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sending
        assert ends.received.parts == []


async def test_a_new_incarnation_is_another_link(kind: str) -> None:
    """What was sent to the old one never reaches the new, and the new works at once."""
    async with nothing_left(), bound(kind) as ends:
        async with running(ends.receiver.run()):
            old = await ends.connect()
            await put(old, b"old", b"1")
            await until(lambda: ends.received.heads == [b"old"], "the first part")
        if kind in TELLS_LOSS:
            assert isinstance(await lost(old), LinkLost)
            with pytest.raises(LinkLost):
                await old.room(1)
            with pytest.raises(LinkLost):  # Nobody answers there any more.
                await ends.connect()
        old.close()
        ends.receiver = receiver_of(kind, ends.context, ends.received.on_part)
        ends.offer = ends.receiver.bind("127.0.0.1")
        async with running(ends.receiver.run()):
            new = await ends.connect()
            await put(new, b"new", b"2")
            await ends.end(new)
            with pytest.raises(LinkLost):
                await old.send(b"late", None)
        assert ends.received.heads == [b"old", b"new", b"end"]


async def test_an_address_that_leads_nowhere(kind: str) -> None:
    async with bound(kind) as ends:
        bad = type(ends.offer)(ends.offer.transport, "nowhere", ends.offer.public_key)
        sender = sender_of(kind, ends.context)
        with pytest.raises(LinkLost, match="nowhere"):
            await sender.connect(bad)
        sender.close()
