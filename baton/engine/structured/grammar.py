"""Constraints as llguidance sees them: its grammar texts, tokenizer and limits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llguidance

from baton.protocol.constraint import Constraint
from baton.protocol.errors import ConfigError, InvalidRequest

MAX_REASON_CHARS = 300
MAX_JSON_WHITESPACE = 8
"""In a row, between two tokens of JSON. Without a bound a model can emit blanks for ever."""


def limits() -> llguidance.LLParserLimits:
    """Work that one compilation and one mask may cost, in llguidance's units.

    They hold in most places, not in all: some regular expressions cost seconds or never end in
    spite of them. What they let through, ``trial`` finds.
    """
    return llguidance.LLParserLimits(
        initial_lexer_fuel=300_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_items_in_row=2_000,
        max_lexer_states=50_000,
        max_grammar_size=20_000,
        verbose_errors=False,
    )


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a grammar must know of the model. ``size``: columns of the logits."""

    tokenizer_path: Path
    size: int
    eos_token_ids: tuple[int, ...]

    def load(self) -> llguidance.LLTokenizer:
        """Takes up to seconds for large vocabularies. Raises ConfigError."""
        if not self.eos_token_ids:
            raise ConfigError(
                "the checkpoint names no eos_token_id, which structured output ends with",
                param="eos_token_id",
            )
        try:
            return llguidance.LLTokenizer(
                str(self.tokenizer_path), n_vocab=self.size, eos_token=list(self.eos_token_ids)
            )
        except ValueError as exc:
            raise ConfigError(
                f"structured output cannot use {self.tokenizer_path.name}: "
                f"{str(exc)[:MAX_REASON_CHARS]}",
                param="model.path",
            ) from exc


def compile_constraint(
    tokenizer: llguidance.LLTokenizer, constraint: Constraint
) -> llguidance.LLMatcher:
    """A matcher at the start of the text. Raises InvalidRequest; may take very long, see
    ``trial``."""
    matcher = llguidance.LLMatcher(
        tokenizer, _grammar_text(constraint), log_level=0, limits=limits()
    )
    if matcher.is_error():
        raise refused(constraint, matcher.get_error())
    return matcher


def refused(constraint: Constraint, reason: str) -> InvalidRequest:
    """The first lines of what llguidance says; the rest dumps its own state."""
    reason = reason.split("<state>")[0].split("<non-verbose/>")[0].strip()[:MAX_REASON_CHARS]
    return InvalidRequest(
        f"{constraint.kind} cannot be followed: {reason}; allowed: what llguidance can compile",
        param=constraint.kind,
    )


def _grammar_text(constraint: Constraint) -> str:
    try:
        match constraint.kind:
            case "json_schema":
                return _json(constraint.text)
            case "json_object":
                return _json('{"type": "object"}')
            case "choice":
                return _choice(json.loads(constraint.text))
            case "regex":
                return llguidance.grammar_from("regex", constraint.text)
            case "grammar":
                return llguidance.grammar_from("grammar", constraint.text)
    except (ValueError, RecursionError) as exc:
        raise refused(constraint, str(exc)) from exc


def _json(schema: str) -> str:
    blanks = rf"[\x20\x0A\x0D\x09]{{0,{MAX_JSON_WHITESPACE}}}"
    return llguidance.LLMatcher.grammar_from_json_schema(
        schema, overrides={"whitespace_pattern": blanks}
    )


def _choice(texts: Sequence[object]) -> str:
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise ValueError("not a list of one or more strings")
    return llguidance.grammar_from("choice", json.dumps(texts))
