"""Which processes outlived what started them. Used by the demo and by the tests."""

from __future__ import annotations

import os
import time

import psutil

GRACE_S = 10.0
POLL_S = 0.1


class Leftovers:
    """``note`` remembers all that descends from this process, while it does: an orphan is
    nobody's descendant any more. ``find`` names what is still there of it."""

    def __init__(self) -> None:
        self._before = set(_descendants())
        self._seen: set[psutil.Process] = set()

    def note(self) -> int:
        """How many processes have been seen so far. Call it before things are ended."""
        self._seen |= set(_descendants()) - self._before
        return len(self._seen)

    def find(self, grace_s: float = GRACE_S) -> list[str]:
        """Those still there when the grace is over; dying takes a moment."""
        self.note()
        until = time.monotonic() + grace_s
        while (left := [p for p in self._seen if _is_alive(p)]) and time.monotonic() < until:
            psutil.wait_procs(left, timeout=POLL_S)
        return [_describe(p) for p in left]


def _descendants() -> list[psutil.Process]:
    return psutil.Process(os.getpid()).children(recursive=True)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:80]}"
    except psutil.Error:
        return str(process.pid)
