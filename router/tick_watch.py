"""Notices when this process did not run: blocked, starved or stopped. Pure."""

from __future__ import annotations


class TickWatch:
    """Asked at every tick. Time in which nobody listened must not count as others' silence."""

    def __init__(self, allowed_s: float) -> None:
        """allowed_s: from one tick to the next without being late."""
        self._allowed_s = allowed_s
        self._ticked_at: float | None = None

    def late_s(self, now: float) -> float:
        """By how much this tick is late; 0 for one in time, and for the first."""
        before, self._ticked_at = self._ticked_at, now
        return 0.0 if before is None else max(0.0, now - before - self._allowed_s)
