"""Large and many parts over every KV transport of this machine: hundreds of MiB, too much for the
quick tests. What else a transport must do: ``tests/conformance/test_kv_transports.py``."""

from __future__ import annotations

import pytest

from tests.conformance.kv_ends import KINDS, bound, linked, put, receiver_of, running, until
from tests.conformance.test_kv_transports import noise

MIB = 2**20

pytestmark = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize(("mib", "num_frames"), [(16, 6), (64, 2)])
async def test_large_frames(kind: str, mib: int, num_frames: int) -> None:
    """Of the largest size there is, and of 16 MiB more than the window holds."""
    block = noise(MIB, 1)
    wanted = [block[n:] + block * (mib - 1) + block[:n] for n in range(num_frames)]
    came = []

    async def compare(head: memoryview, payload: memoryview | None) -> None:
        came.append(payload is not None and bytes(payload) == wanted[int(bytes(head))])

    async with bound(kind) as ends:
        receiver = receiver_of(kind, ends.context, compare)
        ends.offer = receiver.bind("127.0.0.1")
        async with running(receiver.run()):
            sender = await ends.connect(mib * MIB)
            for number, payload in enumerate(wanted):
                await put(sender, b"%d" % number, payload)
            await until(lambda: len(came) == num_frames, "all frames")
    assert came == [True] * num_frames


async def test_many_small_parts(kind: str) -> None:
    async with linked(kind) as (ends, sender):
        for number in range(5_000):
            if number % 2:
                await sender.send(b"%d" % number, None)
            else:
                await put(sender, b"%d" % number, b"%d" % number)
        await ends.end(sender)
        assert ends.received.heads == [*(b"%d" % n for n in range(5_000)), b"end"]
        assert all(p is None or h == p for h, p in ends.received.parts)
