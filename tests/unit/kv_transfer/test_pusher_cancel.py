"""A cancelled transfer's blocks may be another's at once: what was read of them stays here."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from kv_transfer.coding import KvCoding
from tests.conformance.kv_ends import until
from tests.unit.kv_transfer.test_pusher import Outlet, Pushing, pushing, written


async def cancel_and_see(p: Pushing, go_on: Any) -> None:
    """The next transfer's frame goes, nothing of the cancelled one."""
    p.pusher.cancel("r/0")
    p.push(count=16)
    go_on()
    await p.settle(1)
    await asyncio.sleep(0.01)
    assert [frame.index for frame, _ in p.outlet.frames] == [0]


@pytest.mark.parametrize(("codec", "number"), [("raw", 0), ("split", 0), ("split", 1)])
async def test_cancelled_while_it_waits_for_room(
    monkeypatch: pytest.MonkeyPatch, codec: str, number: int
) -> None:
    """number: of the times that room is asked for; a coded frame asks again for less."""
    calls: list[int] = []
    free = asyncio.Event()

    async def room(outlet: Outlet, num_bytes: int) -> None:
        calls.append(num_bytes)
        if len(calls) == number + 1:
            await free.wait()

    monkeypatch.setattr(Outlet, "room", room)
    async with pushing([codec]) as p:
        p.push()
        await until(lambda: len(calls) == number + 1, "wait for room")
        assert p.outlet.parts == []
        await cancel_and_see(p, free.set)


async def test_cancelled_while_it_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    encode, began, free = KvCoding.encode, threading.Event(), threading.Event()

    def slow(coding: KvCoding, *args: Any) -> memoryview:
        began.set()
        assert free.wait(20)
        return encode(coding, *args)

    monkeypatch.setattr(KvCoding, "encode", slow)
    async with pushing(["split"]) as p:
        p.push()
        await until(began.is_set, "encoding")
        await cancel_and_see(p, free.set)


async def test_what_was_on_its_way_when_cancelled_leaves_the_window() -> None:
    async with pushing() as p:
        p.push()
        await p.settle(1)
        await until(lambda: p.pusher.window.num_in_flight > 0, "a frame in the window")
        p.pusher.cancel("r/0")
        assert p.pusher.window.num_in_flight == 0


async def test_what_is_said_of_a_cancelled_transfer_is_not_remembered() -> None:
    async with pushing() as p:
        p.push()
        await p.settle(1)
        p.pusher.progressed(written(p.outlet.frames, 1))
        controller = p.pusher._controller
        assert controller is not None
        assert set(controller._progress) == {"r/0"}
        p.pusher.cancel("r/0")
        p.pusher.progressed(written(p.outlet.frames, 1))
        assert not controller._progress
