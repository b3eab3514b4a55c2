"""Fair turns on one event loop.

Awaiting a ZeroMQ socket that has messages ready does not give the loop a turn, so a peer
that floods could keep everything else from running. Receive loops take a turn off after
some messages.
"""

from __future__ import annotations

import asyncio

MESSAGES_PER_TURN = 64


class Turns:
    def __init__(self) -> None:
        self._left = MESSAGES_PER_TURN

    async def take(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._left = MESSAGES_PER_TURN
            await asyncio.sleep(0)
