"""Codecs made ready before a hand-over needs them: the first use of one may compile it.

Loading machine code takes a tenth of a second for each codec, compiling it, once per machine,
several. So it is begun when a link is there that could want codecs, beside all else, and until a
codec is ready KV goes raw.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from threading import Event, Thread

log = logging.getLogger(__name__)


class CodecWarmUp:
    """use: codes and decodes something by that codec. Thread-safe."""

    def __init__(self, use: Callable[[str], None]) -> None:
        self._use = use
        self._begun: set[str] = set()
        self._ready: set[str] = set()
        self._tasks: SimpleQueue[str | Event] = SimpleQueue()
        self._is_closed = False
        self._thread: Thread | None = None

    def begin(self, names: Iterable[str]) -> None:
        """In their order; what was begun before goes on."""
        for name in names:
            if name not in self._begun:
                self._begun.add(name)
                self._put(name)

    def is_ready(self, name: str) -> bool:
        return name in self._ready

    def wait(self) -> None:
        """Until what was begun is ready."""
        reached = Event()
        self._put(reached)
        reached.wait()

    def close(self) -> None:
        """Begins no other, and does not wait for the one that is being compiled."""
        self._is_closed = True
        if self._thread is not None:
            self._tasks.put(Event())

    def _put(self, task: str | Event) -> None:
        if self._is_closed:
            raise RuntimeError("codecs are not made ready after close")
        self._tasks.put(task)
        if self._thread is None:
            # A daemon: compiling takes longer than a process that was told to end is given.
            self._thread = Thread(target=self._run, name="kv codec warm-up", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while not self._is_closed:
            task = self._tasks.get()
            if isinstance(task, Event):
                task.set()
            elif not self._is_closed:
                self._warm(task)

    def _warm(self, name: str) -> None:
        try:
            self._use(name)
        except Exception:
            log.exception("the KV codec %s does not work here, and is not used", name)
        else:
            self._ready.add(name)
