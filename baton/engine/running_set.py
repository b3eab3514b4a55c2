"""Sequences that hold blocks and take part in steps, always in order of urgency. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from baton.engine.sequence import Sequence


def _urgency(sequence: Sequence) -> int:
    return sequence.urgency


class RunningSet:
    """Adding and removing move pointers in one list: microseconds for thousands of them."""

    def __init__(self) -> None:
        self._ordered: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._ordered)

    def __iter__(self) -> Iterator[Sequence]:
        """Must not change meanwhile; ``in_order`` gives a copy."""
        return iter(self._ordered)

    def __contains__(self, sequence: Sequence) -> bool:
        place = bisect_left(self._ordered, sequence.urgency, key=_urgency)
        # Equal urgency is possible across levels of priority.
        while place < len(self._ordered) and self._ordered[place].urgency == sequence.urgency:
            if self._ordered[place] is sequence:
                return True
            place += 1
        return False

    def in_order(self) -> list[Sequence]:
        return self._ordered.copy()

    @property
    def least_urgent(self) -> Sequence:
        return self._ordered[-1]

    def add(self, sequence: Sequence) -> None:
        insort(self._ordered, sequence, key=_urgency)

    def remove(self, sequence: Sequence) -> None:
        place = bisect_left(self._ordered, sequence.urgency, key=_urgency)
        while self._ordered[place] is not sequence:
            place += 1
        del self._ordered[place]

    def check_integrity(self) -> list[str]:
        urgencies = [s.urgency for s in self._ordered]
        return [] if urgencies == sorted(urgencies) else ["running sequences are out of order"]
