"""What waits for one client. A slow reader gets fewer, larger outputs; ``max_tokens`` bounds
what can wait."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from baton.protocol.errors import BatonError
from router.frontend import Output

MAX_TOKENS_AT_ONCE = 512


class Mailbox:
    """Outputs of one choice wait in a list and are joined when they are read."""

    def __init__(self, num_choices: int) -> None:
        self._pending: dict[int, deque[Output]] = {}
        self._num_open = num_choices
        self._error: BatonError | None = None
        self._news = asyncio.Event()

    def put(self, output: Output) -> None:
        self._pending.setdefault(output.index, deque()).append(output)
        self._news.set()

    def fail(self, error: BatonError) -> None:
        """Said after what is pending was read."""
        self._error = error
        self._news.set()

    async def get(self) -> Output | None:
        """The next output; None when every choice has finished. Raises the request's error."""
        while True:
            if self._pending:
                return self._take(next(iter(self._pending)))
            if self._num_open == 0:
                return None
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()

    def _take(self, index: int) -> Output:
        """All that is there of a choice, up to a message's worth of it; choices take turns."""
        waiting = self._pending.pop(index)
        taken: list[Output] = []
        num_tokens = 0
        while waiting and num_tokens < MAX_TOKENS_AT_ONCE:
            taken.append(waiting.popleft())
            num_tokens += len(taken[-1].tokens)
        if waiting:
            self._pending[index] = waiting
        output = join(taken)
        if output.finish_reason is not None:
            self._num_open -= 1
        return output


def join(outputs: Sequence[Output]) -> Output:
    """Several outputs of one choice, in order and without gaps, as one."""
    first, last = outputs[0], outputs[-1]
    if first is last:
        return first
    for older, newer in pairwise(outputs):
        assert older.seq + len(older.tokens) == newer.seq, "a choice's outputs have no gaps"
    return replace(
        last,
        seq=first.seq,
        tokens=tuple(token for output in outputs for token in output.tokens),
        text="".join(output.text for output in outputs),
        prompt_tokens=first.prompt_tokens,
    )
