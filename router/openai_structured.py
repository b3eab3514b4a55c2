"""The ways in which OpenAI's clients and vLLM's say what the output must conform to."""

from __future__ import annotations

import msgspec

from baton.protocol.constraint import Constraint
from baton.protocol.errors import InvalidRequest
from router.field_checks import shown
from router.structured_output import choice, json_object, json_schema, the_only

ResponseFormatType = ("text", "json_object", "json_schema")


class JsonSchemaFormat(msgspec.Struct, frozen=True, rename={"json_schema": "schema"}):
    """``name`` and ``strict`` change nothing: a schema is always kept to."""

    json_schema: msgspec.Raw = msgspec.Raw()
    name: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    type: str
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's. A schema is an object, or text that holds one. Its other fields change what may be
    written, so they are refused instead of passed over."""

    json: msgspec.Raw = msgspec.Raw()
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: msgspec.Raw = msgspec.Raw()


class StructuredFields(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a request body; the ``guided_`` ones are vLLM's older names."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: msgspec.Raw = msgspec.Raw()
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


def constraint_of(fields: StructuredFields) -> Constraint | None:
    """Raises InvalidRequest for what is not known here, and for more than one constraint."""
    asked = fields.structured_outputs or StructuredOutputs()
    if _is_given(asked.structural_tag):
        raise InvalidRequest(
            "structured_outputs.structural_tag is not supported; allowed: one of json, regex, "
            "choice, grammar, json_object",
            param="structured_outputs",
        )
    found = [_response_format(fields.response_format)]
    for schema in (asked.json, fields.guided_json):
        found.append(json_schema(_text(schema)) if _is_given(schema) else None)
    for regex in (asked.regex, fields.guided_regex):
        found.append(None if regex is None else Constraint("regex", regex))
    for texts in (asked.choice, fields.guided_choice):
        found.append(None if texts is None else choice(texts))
    for grammar in (asked.grammar, fields.guided_grammar):
        found.append(None if grammar is None else Constraint("grammar", grammar))
    found.append(json_object() if asked.json_object else None)
    return the_only([constraint for constraint in found if constraint is not None])


def _response_format(value: ResponseFormat | None) -> Constraint | None:
    if value is None or value.type == "text":
        return None
    if value.type == "json_object":
        return json_object()
    if value.type == "json_schema":
        schema = _text(value.json_schema.json_schema) if value.json_schema else ""
        if schema:
            return json_schema(schema)
        raise InvalidRequest(
            "response_format.json_schema.schema is missing; allowed: a JSON Schema",
            param="response_format",
        )
    raise InvalidRequest(
        f"response_format.type is {shown(value.type)}; allowed: {', '.join(ResponseFormatType)}",
        param="response_format",
    )


def _is_given(raw: msgspec.Raw) -> bool:
    return bytes(raw) not in (b"", b"null")


def _text(raw: msgspec.Raw) -> str:
    """The JSON as it was sent, since the order of properties is that of the output; the text
    itself where it was sent as a string; empty for null."""
    if not _is_given(raw):
        return ""
    sent = bytes(raw)
    return msgspec.json.decode(sent, type=str) if sent.startswith(b'"') else sent.decode()
