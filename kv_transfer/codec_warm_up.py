"""Codecs made ready before a hand-over needs them: the first use of one may compile it.

Loading machine code takes a tenth of a second for each codec, compiling it, once per machine,
several. So it is begun when a link is there that could want codecs, beside all else, and until a
codec is ready KV goes raw.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

log = logging.getLogger(__name__)


class CodecWarmUp:
    """use: codes and decodes something by that codec. Thread-safe."""

    def __init__(self, use: Callable[[str], None]) -> None:
        self._use = use
        self._begun: set[str] = set()
        self._ready: set[str] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv codec warm-up")

    def begin(self, names: Iterable[str]) -> None:
        """In their order; what was begun before goes on."""
        for name in names:
            if name not in self._begun:
                self._begun.add(name)
                self._thread.submit(self._warm, name)

    def is_ready(self, name: str) -> bool:
        return name in self._ready

    def wait(self) -> None:
        """Until what was begun is ready."""
        self._thread.submit(lambda: None).result()

    def _warm(self, name: str) -> None:
        try:
            self._use(name)
        except Exception:
            log.exception("the KV codec %s does not work here, and is not used", name)
        else:
            self._ready.add(name)

    def close(self) -> None:
        """Waits for the one that is being compiled."""
        self._thread.shutdown(wait=True, cancel_futures=True)
