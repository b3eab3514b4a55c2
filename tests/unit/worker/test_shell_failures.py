"""What a callback of the event loop raises ends the worker: the loop itself would only log it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import zmq.asyncio

from baton.worker.events import LayersDone, StepWanted
from baton.worker.shell import WorkerShell


class Broken:
    has_step_in_flight = False

    def __init__(self, at: type) -> None:
        self._at = at

    def handle(self, event: object, now: float) -> list[object]:
        if isinstance(event, self._at):
            raise ZeroDivisionError("broken")
        return []


class Still:
    def now(self) -> float:
        return 0.0


@pytest.mark.parametrize("at", [StepWanted, LayersDone])
async def test_what_a_callback_raises_ends_the_worker(at: type) -> None:
    context = zmq.asyncio.Context()
    unused: Any = None
    shell = WorkerShell(
        context,
        Broken(at),  # type: ignore[arg-type]
        unused,
        Still(),
        describe=unused,
        perform=unused,
        facts=unused,
        grammars=unused,
    )
    shell.server.bind("127.0.0.1")
    loop = asyncio.get_running_loop()
    if at is StepWanted:
        loop.call_soon(shell.feed, object())
    else:
        loop.call_soon(shell._guarded, shell.feed, LayersDone(1, 1))
    try:
        with pytest.raises(ExceptionGroup) as raised:
            async with asyncio.timeout(20):
                # Ticks would need a whole decider: they come later than this.
                await shell.run()
        assert raised.group_contains(ZeroDivisionError, match="broken")
    finally:
        context.destroy(linger=0)
