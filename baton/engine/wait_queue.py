"""Sequences that wait to be admitted: a heap by urgency that can also lose any of them. Pure.

Removal marks, and the heap forgets when the entry comes up; so each operation costs
O(log n) however many wait.
"""

from __future__ import annotations

import heapq

from baton.engine.sequence import Sequence
from baton.protocol.block_hash import BlockKey


class WaitQueue:
    def __init__(self) -> None:
        self._heap: list[tuple[int, str]] = []
        self._ready: dict[str, Sequence] = {}
        self._parked: dict[str, tuple[Sequence, BlockKey]] = {}
        self._parked_at: dict[BlockKey, dict[str, None]] = {}
        self.num_tokens = 0
        """Known tokens of all that wait; a waiting sequence does not grow."""

    def __len__(self) -> int:
        return len(self._ready) + len(self._parked)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.seq_id in self._ready or sequence.seq_id in self._parked

    @property
    def num_parked(self) -> int:
        return len(self._parked)

    def push(self, sequence: Sequence) -> None:
        assert sequence not in self
        self.num_tokens += sequence.num_tokens
        self._enter(sequence)

    def _enter(self, sequence: Sequence) -> None:
        self._ready[sequence.seq_id] = sequence
        heapq.heappush(self._heap, (sequence.urgency, sequence.seq_id))
        if len(self._heap) > 2 * len(self._ready) + 64:
            self._heap = [(s.urgency, s.seq_id) for s in self._ready.values()]
            heapq.heapify(self._heap)

    def peek(self) -> Sequence | None:
        """The most urgent that is not parked."""
        while self._heap:
            urgency, seq_id = self._heap[0]
            sequence = self._ready.get(seq_id)
            if sequence is not None and sequence.urgency == urgency:
                return sequence
            heapq.heappop(self._heap)
        return None

    def remove(self, sequence: Sequence) -> None:
        self.num_tokens -= sequence.num_tokens
        if self._ready.pop(sequence.seq_id, None) is None:
            _, key = self._parked.pop(sequence.seq_id)
            beside = self._parked_at[key]
            del beside[sequence.seq_id]
            if not beside:
                del self._parked_at[key]

    def park(self, sequence: Sequence, key: BlockKey) -> None:
        """Set aside until ``wake(key)``: others may pass."""
        del self._ready[sequence.seq_id]
        self._parked[sequence.seq_id] = (sequence, key)
        self._parked_at.setdefault(key, {})[sequence.seq_id] = None

    def wake(self, key: BlockKey) -> None:
        for seq_id in self._parked_at.pop(key, ()):
            sequence, _ = self._parked.pop(seq_id)
            self._enter(sequence)

    def parked_at(self) -> list[BlockKey]:
        return list(self._parked_at)

    def ids(self) -> set[str]:
        return {*self._ready, *self._parked}

    def check_integrity(self) -> list[str]:
        problems = []
        queued = {seq_id for _, seq_id in self._heap}
        problems += [f"{i} waits outside of the heap" for i in self._ready if i not in queued]
        everyone = [*self._ready.values(), *(s for s, _ in self._parked.values())]
        if self.num_tokens != sum(s.num_tokens for s in everyone):
            problems.append("the waiting tokens do not add up")
        parked = sorted(i for ids in self._parked_at.values() for i in ids)
        if parked != sorted(self._parked):
            problems.append("parked sequences and their keys do not match")
        return problems
