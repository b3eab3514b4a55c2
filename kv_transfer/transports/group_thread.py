"""One link's process group and the one thread that joins it, waits for its moves and lets go.

For a library whose waits know no event loop, and whose abort may block as well: that has a
thread of its own. Threads are daemons: a call that never comes back (NCCL's can) must not keep
the process from ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from kv_transfer.transports.pair_group import PairGroup

log = logging.getLogger(__name__)

T = TypeVar("T")

NAME = "kv-p2p"
ABORT_DEADLINE_S = 10.0
_turn = threading.Lock()


class GroupThread:
    """Used from the event loop that it is made on. Futures fail with what a call raised."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._group: PairGroup | None = None
        self._lock = threading.Lock()
        self._is_closed = False
        threading.Thread(target=self._run, name=NAME, daemon=True).start()

    def join(self, make: Callable[[], PairGroup]) -> asyncio.Future[None]:
        """A group that is made after ``close`` is aborted at once."""

        def run() -> None:
            group = make()
            with self._lock:
                if not self._is_closed:
                    self._group = group
                    return
            group.abort()

        return self.call(run)

    def send(self, payload: Tensor) -> asyncio.Future[None]:
        group = self._joined()
        return self.call(lambda: group.send(payload))

    def receive(self, payload: Tensor) -> asyncio.Future[None]:
        group = self._joined()
        return self.call(lambda: group.receive(payload))

    def _joined(self) -> PairGroup:
        if self._group is None:
            raise RuntimeError("the group is closed")
        return self._group

    def call(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Anything else that blocks, in its turn."""
        future: asyncio.Future[T] = self._loop.create_future()

        def settle(set_outcome: Callable[[], None]) -> None:
            if not future.done():
                set_outcome()

        def run() -> None:
            try:
                set_outcome = functools.partial(future.set_result, function())
            except Exception as exc:
                # Without its frames, which hold the group.
                set_outcome = functools.partial(future.set_exception, exc.with_traceback(None))
            with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits.
                self._loop.call_soon_threadsafe(settle, set_outcome)

        self._calls.put(run)
        return future

    def close(self) -> None:
        """Idempotent. Moves in flight fail soon, in the thread; nobody need wait for that."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            group, self._group = self._group, None
        self._calls.put(None)
        if group is not None:
            threading.Thread(
                target=_abort, args=(group,), name=f"{NAME}-abort", daemon=True
            ).start()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call


def _abort(group: PairGroup) -> None:
    alarm = threading.Timer(
        ABORT_DEADLINE_S,
        log.error,
        ("a KV group's abort hangs: this worker may hang with it, restart it",),
    )
    alarm.name, alarm.daemon = f"{NAME}-alarm", True
    alarm.start()
    # One at a time: both ends may be in one process. Behind one that hangs, none waits for ever.
    has_turn = _turn.acquire(timeout=ABORT_DEADLINE_S)
    try:
        group.abort()
    finally:
        if has_turn:
            _turn.release()
        alarm.cancel()
