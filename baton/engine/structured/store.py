"""Compiled grammars of one worker: the ones used last are kept.

A compiled grammar is a matcher at the start of its text; each sequence gets a copy, which shares
what the lexer has learnt. Thread-safe: one thread compiles while the engine's takes copies.
"""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

import llguidance

from baton.engine.structured.grammar import Vocabulary, compile_constraint
from baton.protocol.constraint import Constraint

MAX_KEPT_GRAMMARS = 64


class GrammarStore:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._kept: OrderedDict[Constraint, llguidance.LLMatcher] = OrderedDict()
        self._lock = Lock()
        self._compiling = Lock()

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def has(self, constraint: Constraint) -> bool:
        return constraint in self._kept

    def add(self, constraint: Constraint) -> None:
        """Compile unless it is here. Raises InvalidRequest or ConfigError."""
        with self._compiling:
            if self.has(constraint):
                return
            if self._tokenizer is None:
                self._tokenizer = self.vocabulary.load()
            matcher = compile_constraint(self._tokenizer, constraint)
        with self._lock:
            self._kept[constraint] = matcher
            while len(self._kept) > MAX_KEPT_GRAMMARS:
                self._kept.popitem(last=False)

    def matcher(self, constraint: Constraint) -> llguidance.LLMatcher:
        """A new one at the start of the text; compiles what was forgotten meanwhile."""
        while True:
            with self._lock:
                kept = self._kept.get(constraint)
                if kept is not None:
                    self._kept.move_to_end(constraint)
                    return kept.deep_copy()
            self.add(constraint)

    def forget(self, constraint: Constraint) -> None:
        """One that failed on the way: its lexer, shared by all copies, may have hit a limit."""
        with self._lock:
            self._kept.pop(constraint, None)
