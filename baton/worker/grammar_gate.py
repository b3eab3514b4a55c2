"""Sequences that wait until the grammar of their structured output is compiled. Pure.

A scheduler never sees one whose first mask could not be made at once. Whether a grammar is ready
is the shell's knowledge: it answers ``CompileGrammar`` for every newcomer, mostly at once. What
nobody waits for any more is taken back, so that a client who goes away leaves no work behind.
"""

from __future__ import annotations

from baton.engine.sequence import Sequence
from baton.protocol.constraint import Constraint
from baton.worker.events import CompileGrammar, ForgetGrammar


class GrammarGate:
    def __init__(self) -> None:
        self._waiting: dict[Constraint, dict[str, None]] = {}
        """Ids of those held and of those expected, in order of arrival."""
        self._constraint_of: dict[str, Constraint] = {}
        self._held: dict[str, Sequence] = {}
        self._deserted: dict[Constraint, None] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, seq_id: str) -> bool:
        return seq_id in self._held

    @property
    def num_with_blocks(self) -> int:
        return sum(bool(sequence.block_table) for sequence in self._held.values())

    @property
    def expected(self) -> list[str]:
        """Ids of those that are still to come and whose grammar is not here."""
        return [seq_id for seq_id in self._constraint_of if seq_id not in self._held]

    def expect(self, seq_id: str, constraint: Constraint) -> list[CompileGrammar]:
        """Have it compiled for a sequence whose KV is on its way: ``hold`` or ``drop`` follows."""
        return self._wait(seq_id, constraint)

    def hold(self, sequence: Sequence) -> list[CompileGrammar]:
        """Until ``open`` for its constraint, or ``drop``. It may own blocks meanwhile."""
        constraint = sequence.sampling.constraint
        assert constraint is not None
        self._held[sequence.seq_id] = sequence
        return self._wait(sequence.seq_id, constraint)

    def _wait(self, seq_id: str, constraint: Constraint) -> list[CompileGrammar]:
        self._constraint_of[seq_id] = constraint
        self._waiting.setdefault(constraint, {})[seq_id] = None
        return [CompileGrammar(constraint)]

    def open(self, constraint: Constraint, compiled: object = None) -> list[Sequence]:
        """The answer is here: let go of all that waited for it, in order of arrival."""
        waited = self._waiting.pop(constraint, {})
        for seq_id in waited:
            del self._constraint_of[seq_id]
        sequences = [self._held.pop(seq_id) for seq_id in waited if seq_id in self._held]
        for sequence in sequences:
            sequence.grammar = compiled
        return sequences

    def drop(self, seq_id: str) -> Sequence | None:
        """Idempotent. None too for one that was only expected."""
        constraint = self._constraint_of.pop(seq_id, None)
        if constraint is None:
            return None
        waiting = self._waiting[constraint]
        del waiting[seq_id]
        if not waiting:
            del self._waiting[constraint]
            self._deserted[constraint] = None
        return self._held.pop(seq_id, None)

    def deserted(self) -> list[ForgetGrammar]:
        """Once of each: what those that were dropped leave with nobody waiting for it."""
        forgotten = [ForgetGrammar(c) for c in self._deserted if c not in self._waiting]
        self._deserted.clear()
        return forgotten
