"""Compiled grammars of one worker: the ones used last are kept, and those that a sequence needs.

Whoever holds a ``CompiledGrammar`` pins it: as long as a sequence does, the engine finds it here,
however many others were compiled meanwhile. So an engine step never compiles. Thread-safe: one
thread compiles while the engine's takes copies.
"""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from weakref import WeakValueDictionary

import llguidance

from baton.engine.structured.grammar import Vocabulary, compile_constraint
from baton.protocol.constraint import Constraint
from baton.protocol.errors import InternalError

MAX_KEPT_GRAMMARS = 64
"""For those to come; what sequences hold is beside it."""


class CompiledGrammar:
    """A matcher at the start of its text. Each sequence gets a copy, which shares what the lexer
    has learnt."""

    def __init__(self, start: llguidance.LLMatcher) -> None:
        self.start = start
        self.is_spent = False
        """It failed on the way: the lexer, shared by all copies, may have hit a limit. Sequences
        that hold it go on with it; for a new one it is compiled again, and so for them."""

    def matcher(self) -> llguidance.LLMatcher:
        return self.start.deep_copy()


class GrammarStore:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._kept: OrderedDict[Constraint, CompiledGrammar] = OrderedDict()
        self._alive: WeakValueDictionary[Constraint, CompiledGrammar] = WeakValueDictionary()
        """The kept ones and those that somebody else holds."""
        self._lock = Lock()
        self._compiling = Lock()

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def get(self, constraint: Constraint) -> CompiledGrammar | None:
        """For a new sequence, if it is here; it counts as used."""
        with self._lock:
            found = self._alive.get(constraint)
            if found is None or found.is_spent:
                return None
            self._keep(constraint, found)
            return found

    def add(self, constraint: Constraint) -> CompiledGrammar:
        """Compile unless it is here. Raises InvalidRequest or ConfigError."""
        with self._compiling:
            found = self.get(constraint)
            if found is not None:
                return found
            if self._tokenizer is None:
                self._tokenizer = self.vocabulary.load()
            start = compile_constraint(self._tokenizer, constraint)
            with self._lock:
                compiled = self._alive.setdefault(constraint, CompiledGrammar(start))
                compiled.start, compiled.is_spent = start, False
                self._keep(constraint, compiled)
        return compiled

    def matcher(self, constraint: Constraint) -> llguidance.LLMatcher:
        """A new one, for a sequence that holds its grammar. Raises InternalError if none does:
        compiling here would be within a step."""
        with self._lock:
            found = self._alive.get(constraint)
            if found is None:
                raise InternalError(
                    f"a sequence does not hold the {constraint.kind} that it runs with",
                    retryable=True,
                )
            return found.matcher()

    def forget(self, constraint: Constraint) -> None:
        """One that failed on the way is for no new sequence."""
        with self._lock:
            found = self._alive.get(constraint)
            if found is not None:
                found.is_spent = True
            self._kept.pop(constraint, None)

    def _keep(self, constraint: Constraint, compiled: CompiledGrammar) -> None:
        self._kept[constraint] = compiled
        self._kept.move_to_end(constraint)
        while len(self._kept) > MAX_KEPT_GRAMMARS:
            self._kept.popitem(last=False)
