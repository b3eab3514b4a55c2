"""One end of a KV link is another process, and is killed or stopped in the middle of frames."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator

import msgspec
import pytest

from baton.protocol.messages import KvOffer
from kv_transfer.transports.contract import LinkLost
from tests.conformance.kv_ends import (
    BETWEEN_PROCESSES,
    TELLS_LOSS,
    TIMEOUT_S,
    Ends,
    bound,
    lost,
    nothing_left,
    put,
    running,
    until,
)
from tests.conformance.kv_peer import check, frame

FRAME_BYTES = 2**20

pytestmark = pytest.mark.parametrize("kind", BETWEEN_PROCESSES)


@contextlib.asynccontextmanager
async def peer(*args: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.conformance.kv_peer", *args, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def line_of(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(TIMEOUT_S):
        line = (await process.stdout.readline()).decode().strip()
    assert line, "the peer ended"
    return line


def sending_peer(
    kind: str, offer: KvOffer
) -> contextlib.AbstractAsyncContextManager[asyncio.subprocess.Process]:
    return peer("send", kind, offer.transport, offer.address, str(FRAME_BYTES))


async def receiving_peer(process: asyncio.subprocess.Process) -> KvOffer:
    return msgspec.json.decode(await line_of(process), type=KvOffer)


async def _end_well(ends: Ends) -> None:
    """Another sender works as if nothing had been."""
    other = await ends.connect()
    await put(other, b"other", b"unharmed")
    await ends.end(other)
    assert (b"other", b"unharmed") in ends.received.parts


async def test_a_sender_is_killed(kind: str) -> None:
    """The frames that arrived are whole, the next sender is served, nothing is left."""
    async with nothing_left(), bound(kind) as ends, running(ends.receiver.run()):
        async with sending_peer(kind, ends.offer) as process:
            await until(lambda: len(ends.received.parts) > 20, "frames")
            process.kill()
            await process.wait()
        await _end_well(ends)
        for number, (head, payload) in enumerate(ends.received.parts[:-2]):
            assert int(head) == number
            assert payload is not None
            check(head, memoryview(payload))


async def test_a_sender_is_killed_while_its_frame_is_read(kind: str) -> None:
    async with nothing_left(), bound(kind) as ends, running(ends.receiver.run()):
        ends.received.gate.clear()
        async with sending_peer(kind, ends.offer) as process:
            await line_of(process)
            await asyncio.sleep(0.5)
            process.kill()
            await process.wait()
        ends.received.gate.set()
        await until(lambda: len(ends.received.parts) > 0, "what the reader had in its hands")
        head, payload = ends.received.parts[0]
        assert payload is not None
        check(head, memoryview(payload))
        await _end_well(ends)


async def test_a_sender_is_stopped_and_goes_on(kind: str) -> None:
    """SIGSTOP holds up its own frames and nobody else's; after SIGCONT they go on in order."""
    async with nothing_left(), bound(kind) as ends, running(ends.receiver.run()):
        async with sending_peer(kind, ends.offer) as process:
            await until(lambda: len(ends.received.parts) > 5, "frames")
            process.send_signal(signal.SIGSTOP)
            other = await ends.connect()
            await put(other, b"other", b"unharmed")
            await until(lambda: b"other" in ends.received.heads, "the other's part")
            while True:  # What the stopped one had sent.
                num_parts = len(ends.received.parts)
                await asyncio.sleep(0.3)
                if num_parts == len(ends.received.parts):
                    break
            process.send_signal(signal.SIGCONT)
            await until(lambda: len(ends.received.parts) > num_parts + 5, "more frames")
            process.kill()
            await process.wait()
        numbers = [int(head) for head in ends.received.heads if head != b"other"]
        assert numbers == list(range(len(numbers)))


async def test_a_receiver_is_killed_and_another_takes_its_place(kind: str) -> None:
    async with nothing_left(), bound(kind) as ends:
        async with peer("receive", kind) as process:
            ends.offer = await receiving_peer(process)
            sender = await ends.connect()
            for number in range(5):
                await put(sender, b"%d" % number, frame(number, FRAME_BYTES))
                assert await line_of(process) == str(number)
            process.kill()
            await process.wait()
            if kind in TELLS_LOSS:
                assert isinstance(await lost(sender), LinkLost)
            sender.close()
        async with peer("receive", kind) as process:
            ends.offer = await receiving_peer(process)
            sender = await ends.connect()
            await put(sender, b"7", frame(7, FRAME_BYTES))
            assert await line_of(process) == "7"


async def test_a_receiver_is_stopped_and_goes_on(kind: str) -> None:
    async with nothing_left(), bound(kind) as ends, peer("receive", kind) as process:
        ends.offer = await receiving_peer(process)
        sender = await ends.connect(FRAME_BYTES)
        process.send_signal(signal.SIGSTOP)

        async def send_all() -> None:
            for number in range(60):
                await put(sender, b"%d" % number, frame(number, FRAME_BYTES))

        sending = asyncio.ensure_future(send_all())
        stalled_at = -1
        while stalled_at != sender.num_bytes:
            stalled_at = sender.num_bytes
            await asyncio.sleep(0.3)
        assert not sending.done()
        if kind in TELLS_LOSS:
            assert stalled_at <= sender.window_bytes
        process.send_signal(signal.SIGCONT)
        await sending
        for number in range(60):
            assert await line_of(process) == str(number)
