"""What waits for one client. A slow reader gets fewer, larger outputs, never a longer queue."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from baton.protocol.errors import BatonError
from router.frontend import Output


class Mailbox:
    """At most one pending output per choice: news of a choice join what is there."""

    def __init__(self, num_choices: int) -> None:
        self._pending: dict[int, Output] = {}
        self._num_open = num_choices
        self._error: BatonError | None = None
        self._news = asyncio.Event()

    def put(self, output: Output) -> None:
        old = self._pending.get(output.index)
        self._pending[output.index] = output if old is None else join(old, output)
        self._news.set()

    def fail(self, error: BatonError) -> None:
        """Said after what is pending was read."""
        self._error = error
        self._news.set()

    async def get(self) -> Output | None:
        """The next output; None when every choice has finished. Raises the request's error."""
        while True:
            if self._pending:
                output = self._pending.pop(next(iter(self._pending)))
                if output.finish_reason is not None:
                    self._num_open -= 1
                return output
            if self._num_open == 0:
                return None
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()


def join(older: Output, newer: Output) -> Output:
    assert older.seq + len(older.tokens) == newer.seq, "a choice's outputs have no gaps"
    return replace(
        newer,
        seq=older.seq,
        tokens=older.tokens + newer.tokens,
        text=older.text + newer.text,
    )
