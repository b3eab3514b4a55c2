"""Structured output on its way in: OpenAI's names, vLLM's, gRPC's and the SDK's."""

from __future__ import annotations

import json
from typing import Any

import pytest

from baton.api.v1 import baton_pb2 as pb
from baton.client.requests import generate_request
from baton.client.types import Options
from baton.protocol.constraint import MAX_CONSTRAINT_BYTES, Constraint
from baton.protocol.errors import InvalidRequest
from baton.protocol.sampling import SamplingParams
from router.grpc_convert import raw_request
from router.openai_request import completion_raw_requests, read_completion_request
from router.structured_output import checked

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "null"}}}
BY_SCHEMA = Constraint("json_schema", json.dumps(SCHEMA))


def from_http(**fields: Any) -> Constraint | None:
    body = json.dumps({"prompt": "x", **fields}).encode()
    [raw] = completion_raw_requests(read_completion_request(body), "r")
    return raw.constraint


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None, "guided_json": None, "structured_outputs": None}, None),
        ({"response_format": {"type": "json_object"}}, Constraint("json_object", "")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            BY_SCHEMA,
        ),
        ({"guided_json": SCHEMA}, BY_SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, BY_SCHEMA),
        ({"guided_regex": "[a-z]"}, Constraint("regex", "[a-z]")),
        ({"guided_choice": ["a", "ä"]}, Constraint("choice", '["a", "\\u00e4"]')),
        ({"guided_grammar": 'start: "a"'}, Constraint("grammar", 'start: "a"')),
        ({"structured_outputs": {"json": SCHEMA}}, BY_SCHEMA),
        ({"structured_outputs": {"regex": "a"}}, Constraint("regex", "a")),
        ({"structured_outputs": {"choice": ["a"]}}, Constraint("choice", '["a"]')),
        ({"structured_outputs": {"grammar": "g"}}, Constraint("grammar", "g")),
        ({"structured_outputs": {"json_object": True}}, Constraint("json_object", "")),
        ({"structured_outputs": {"json_object": False}}, None),
    ],
)
def test_http_names(fields: dict[str, Any], expected: Constraint | None) -> None:
    assert from_http(**fields) == expected


def test_the_order_of_properties_is_kept() -> None:
    constraint = from_http(guided_json=SCHEMA)
    assert constraint is not None
    assert list(json.loads(constraint.text)["properties"]) == ["b", "a"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "xml"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "schema is missing"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "structural_tag"),
        (
            {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": ""}},
            "structured_outputs",
            "whitespace_pat",
        ),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "choice", "one way"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "regex", "one way"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "not supported"),
        ({"guided_choice": [1]}, "guided_choice[0]", "Expected `str`"),
    ],
)
def test_http_refusals(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        from_http(**fields)
    assert caught.value.param == param


def test_an_empty_schema_is_not_none() -> None:
    for fields in ({"guided_json": ""}, {"structured_outputs": {"json": ""}}):
        constraint = from_http(**fields)
        assert constraint is not None
        with pytest.raises(InvalidRequest, match="not JSON"):
            checked(constraint)


OPTIONS: list[tuple[Options, Constraint]] = [
    ({"json_schema": SCHEMA}, BY_SCHEMA),
    ({"json_schema": json.dumps(SCHEMA)}, BY_SCHEMA),
    ({"json_object": True}, Constraint("json_object", "")),
    ({"regex": "a+"}, Constraint("regex", "a+")),
    ({"grammar": "g"}, Constraint("grammar", "g")),
    ({"choice": ["a", "b"]}, Constraint("choice", '["a", "b"]')),
]


@pytest.mark.parametrize(("options", "expected"), OPTIONS)
def test_sdk_to_grpc_to_router(options: Options, expected: Constraint) -> None:
    sent = generate_request("x", options).SerializeToString()
    assert raw_request(pb.GenerateRequest.FromString(sent)).constraint == expected


def test_sdk_and_grpc_take_one_constraint() -> None:
    with pytest.raises(InvalidRequest, match="json_object and regex") as caught:
        generate_request("x", {"regex": "a", "json_object": True})
    assert caught.value.hop == "client"
    off = pb.GenerateRequest(text="x", sampling_params=pb.SamplingParams(json_object=False))
    assert raw_request(off).constraint is None


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (Constraint("regex", "a" * (MAX_CONSTRAINT_BYTES + 1)), "at most 65536"),
        (Constraint("grammar", "ä" * (MAX_CONSTRAINT_BYTES // 2 + 1)), "65538 bytes"),
        (Constraint("regex", " "), "empty"),
        (Constraint("regex", "\ud800"), "surrogate"),
        (Constraint("json_schema", "{"), "not JSON"),
        (Constraint("json_schema", "[1]"), "an object"),
        (Constraint("json_schema", '{"a":' * 65 + "1" + "}" * 65), "deeper than 64"),
        (Constraint("json_schema", '{"a":' * 9_000 + "1" + "}" * 9_000), "json_schema"),
        (Constraint("choice", "[]"), "1 to 1024"),
        (Constraint("choice", json.dumps(["a"] * 1_025)), "1 to 1024"),
        (Constraint("choice", '["a", ""]'), "choice.1."),
    ],
)
def test_what_is_refused_before_any_worker_sees_it(constraint: Constraint, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        checked(constraint)
    assert caught.value.param == constraint.kind


def test_a_schema_as_deep_as_allowed_passes() -> None:
    deep = Constraint("json_schema", '{"a":' * 63 + "1" + "}" * 63)
    assert checked(deep) is deep


@pytest.mark.parametrize(("field", "value"), [("ignore_eos", True), ("min_tokens", 1)])
def test_what_would_go_on_behind_the_end_is_refused(field: str, value: Any) -> None:
    asked: dict[str, Any] = {field: value}
    SamplingParams(**asked).validate()
    with pytest.raises(InvalidRequest, match="with structured output") as caught:
        SamplingParams(constraint=Constraint("regex", "a"), **asked).validate()
    assert caught.value.param == field
