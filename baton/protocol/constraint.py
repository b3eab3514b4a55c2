"""Structured output: what the text of a completion must conform to. Travels as data.

Workers turn it into a grammar (``baton.engine.structured``); what it says is judged there.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from baton.protocol.errors import InvalidRequest

MAX_CONSTRAINT_BYTES = 64 * 2**10

ConstraintKind = Literal["json_schema", "json_object", "regex", "grammar", "choice"]


class Constraint(msgspec.Struct, frozen=True, array_like=True):
    """Hashable: the same kind and text are the same grammar.

    text: of json_schema a JSON Schema; of regex a regular expression that matches the whole
      text; of grammar Lark or GBNF; of choice a JSON list of strings; of json_object empty.
    """

    kind: ConstraintKind
    text: str

    def validate(self) -> None:
        """Raises InvalidRequest. Of the text only the size: the rest is seen when it is
        compiled."""
        num_bytes = len(self.text.encode("utf-8", "surrogatepass"))
        if num_bytes > MAX_CONSTRAINT_BYTES:
            raise InvalidRequest(
                f"{self.kind} has {num_bytes} bytes; allowed: at most {MAX_CONSTRAINT_BYTES}",
                param=self.kind,
            )
