"""When a failed call is tried again. Nothing here sleeps or reads a clock."""

from __future__ import annotations

import random
from dataclasses import dataclass

from baton.protocol.errors import BatonError, RequestConflict

BASE_DELAY_S = 0.1
MAX_DELAY_S = 2.0


@dataclass(slots=True)
class Retry:
    """The budget of one call: ``max_retries`` more tries, none past ``deadline_s``.

    Callers ask only while the call has produced no output: then nothing can be repeated.
    All tries carry the same request id, so the router never runs two of them at once.
    """

    max_retries: int
    deadline_s: float | None
    num_tried: int = 0

    def delay_s(self, error: BatonError, now_s: float) -> float | None:
        """Seconds to wait before the next try; None: give up with ``error``.

        A conflict on a later try is the earlier one, still being wound down.
        """
        own_echo = isinstance(error, RequestConflict) and self.num_tried > 0
        if not (error.retryable or own_echo) or self.num_tried >= self.max_retries:
            return None
        delay_s = min(BASE_DELAY_S * 2.0**self.num_tried, MAX_DELAY_S) * random.uniform(0.5, 1.5)
        if self.deadline_s is not None and now_s + delay_s >= self.deadline_s:
            return None
        self.num_tried += 1
        return delay_s

    def remaining_s(self, now_s: float) -> float | None:
        """None: no limit of our own."""
        return None if self.deadline_s is None else max(self.deadline_s - now_s, 0.001)
