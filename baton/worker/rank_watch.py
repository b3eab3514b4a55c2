"""Notices the end of a rank while no step runs: between steps nothing waits for it."""

from __future__ import annotations

import asyncio
from typing import Protocol

from baton.protocol.errors import RankLost


class RankedEngine(Protocol):
    @property
    def rank_fds(self) -> tuple[int, ...]: ...

    def rank_loss(self) -> RankLost: ...


async def watch_ranks(engine: RankedEngine) -> None:
    """Raise RankLost when a rank is gone. Return at once where there is one rank only."""
    if not engine.rank_fds:
        return
    loop = asyncio.get_running_loop()
    is_gone = asyncio.Event()
    for fd in engine.rank_fds:
        loop.add_reader(fd, is_gone.set)
    try:
        await is_gone.wait()
    finally:
        for fd in engine.rank_fds:
            loop.remove_reader(fd)
    raise engine.rank_loss()
