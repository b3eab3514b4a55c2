"""Which processes outlived what started them. Used by the demo and by the tests."""

from __future__ import annotations

import os
import time

import psutil

GRACE_S = 10.0
POLL_S = 0.1


class Leftovers:
    """Remembers the processes of this user at construction; ``find`` names newer ones that
    descend from this process, or that Ray started and left."""

    def __init__(self) -> None:
        self._before = {p.pid for p in psutil.process_iter()}

    def find(self, grace_s: float = GRACE_S) -> list[str]:
        """Those still there when the grace is over; dying takes a moment."""
        until = time.monotonic() + grace_s
        while (left := self._now()) and time.monotonic() < until:
            psutil.wait_procs(left, timeout=POLL_S)
        return [_describe(p) for p in left]

    def _now(self) -> list[psutil.Process]:
        mine = {p.pid for p in psutil.Process(os.getpid()).children(recursive=True)}
        return [
            p
            for p in psutil.process_iter()
            if p.pid not in self._before and _is_alive(p) and (p.pid in mine or _is_ours(p))
        ]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _is_ours(process: psutil.Process) -> bool:
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return any(mark in words for mark in ("cluster.process", "ray::", "raylet", "gcs_server"))


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:80]}"
    except psutil.Error:
        return str(process.pid)
