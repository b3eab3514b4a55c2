"""Cheap checks of structured output: size, kind, JSON. Workers compile it and see the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import msgspec

from baton.protocol.constraint import Constraint
from baton.protocol.errors import InvalidRequest
from router.field_checks import check_text, shown

MAX_CHOICES = 1_024
MAX_SCHEMA_DEPTH = 64


def checked(constraint: Constraint) -> Constraint:
    """Raises InvalidRequest that names the kind of constraint."""
    param = constraint.kind
    check_text(param, constraint.text)
    constraint.validate()
    if param in ("regex", "grammar") and not constraint.text.strip():
        raise InvalidRequest(f"{param} is empty; allowed: text", param=param)
    if param == "json_schema":
        _check_schema(constraint.text)
    if param == "choice":
        _check_choices(json.loads(constraint.text))
    return constraint


def json_schema(schema: str | Mapping[str, object]) -> Constraint:
    return Constraint("json_schema", schema if isinstance(schema, str) else json.dumps(schema))


def json_object() -> Constraint:
    return Constraint("json_object", "")


def choice(texts: Sequence[str]) -> Constraint:
    return Constraint("choice", json.dumps(list(texts)))


def the_only(found: Sequence[Constraint]) -> Constraint | None:
    """Raises InvalidRequest when there are several."""
    if len(found) > 1:
        kinds = " and ".join(c.kind for c in found)
        raise InvalidRequest(
            f"{kinds} given; allowed: one way of structuring the output", param=found[1].kind
        )
    return found[0] if found else None


def _check_schema(text: str) -> None:
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise InvalidRequest(
            f"json_schema is not JSON: {str(exc)[:200]}; allowed: a JSON Schema",
            param="json_schema",
        ) from exc
    if not isinstance(schema, dict | bool):
        raise InvalidRequest(
            f"json_schema is {shown(schema)}; allowed: a JSON Schema, which is an object",
            param="json_schema",
        )
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise InvalidRequest(
            f"json_schema is nested deeper than {MAX_SCHEMA_DEPTH} levels; allowed: at most that",
            param="json_schema",
        )


def _depth(value: object) -> int:
    """Level by level: the nesting came from outside and may be deep."""
    depth, level = 0, [value]
    while level := [
        inner
        for outer in level
        if isinstance(outer, dict | list)
        for inner in (outer.values() if isinstance(outer, dict) else outer)
    ]:
        depth += 1
    return depth


def _check_choices(texts: Sequence[object]) -> None:
    if not 1 <= len(texts) <= MAX_CHOICES:
        raise InvalidRequest(
            f"choice has {len(texts)} texts; allowed: 1 to {MAX_CHOICES}", param="choice"
        )
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise InvalidRequest(
                f"choice[{index}] is {shown(text)}; allowed: text of at least one character",
                param="choice",
            )
        check_text(f"choice[{index}]", text, param="choice")
