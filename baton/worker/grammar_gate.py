"""Sequences that wait until the grammar of their structured output is compiled. Pure.

A scheduler never sees one whose first mask could not be made at once. Whether a grammar is ready
is the shell's knowledge: it answers ``CompileGrammar`` for every newcomer, mostly at once.
"""

from __future__ import annotations

from baton.engine.sequence import Sequence
from baton.protocol.constraint import Constraint
from baton.worker.events import CompileGrammar


class GrammarGate:
    def __init__(self) -> None:
        self._held: dict[Constraint, dict[str, Sequence]] = {}
        self._constraint_of: dict[str, Constraint] = {}

    def __len__(self) -> int:
        return len(self._constraint_of)

    def __contains__(self, seq_id: str) -> bool:
        return seq_id in self._constraint_of

    @property
    def num_with_blocks(self) -> int:
        return sum(bool(s.block_table) for held in self._held.values() for s in held.values())

    def hold(self, sequence: Sequence) -> list[CompileGrammar]:
        """Until ``open`` for its constraint, or ``drop``. It may own blocks meanwhile."""
        constraint = sequence.sampling.constraint
        assert constraint is not None
        self._constraint_of[sequence.seq_id] = constraint
        self._held.setdefault(constraint, {})[sequence.seq_id] = sequence
        return [CompileGrammar(constraint)]

    def open(self, constraint: Constraint) -> list[Sequence]:
        """The answer is here: let go of all that waited for it, in order of arrival."""
        waited = self._held.pop(constraint, {})
        for seq_id in waited:
            del self._constraint_of[seq_id]
        return list(waited.values())

    def drop(self, seq_id: str) -> Sequence | None:
        constraint = self._constraint_of.pop(seq_id, None)
        if constraint is None:
            return None
        waiting = self._held[constraint]
        sequence = waiting.pop(seq_id)
        if not waiting:
            del self._held[constraint]
        return sequence
