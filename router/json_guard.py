"""JSON bodies from outside: caps are checked on the bytes, before any object is built."""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from baton.protocol.errors import InvalidRequest
from router.limits import MAX_JSON_CONTAINERS, MAX_JSON_DEPTH, MAX_JSON_KEYS

T = TypeVar("T")

# Possessive and able to match up to the end of the body, so that an unterminated string
# costs one pass and not one per quote.
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")
_NOT_A_NUMBER = re.compile(rb'"(\w{1,64})"\s*:\s*(-?(?:NaN|Infinity))')
_LONE_SURROGATE = re.compile(
    rb"(?<!\\)(?:\\\\)*(\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|\\u[dD][c-fC-F])"
)
_FIELD_OF_PATH = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")


def decode_json(body: bytes, type_: type[T]) -> T:
    """Raises InvalidRequest: not UTF-8, not JSON, too deep, too many keys, a wrong type."""
    check_caps(body)
    try:
        return msgspec.json.decode(body, type=type_)
    except msgspec.ValidationError as exc:
        raise _wrong_type(exc) from exc
    except msgspec.DecodeError as exc:
        raise _malformed(body, exc) from exc


def check_caps(body: bytes) -> None:
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise InvalidRequest(
            f"the body is not valid UTF-8: byte {exc.start} is 0x{body[exc.start]:02x}",
            param="body",
        ) from exc
    bare = _STRING.sub(b'""', body)
    num_keys = bare.count(b":")
    if num_keys > MAX_JSON_KEYS:
        raise InvalidRequest(
            f"the body has {num_keys} keys; allowed: at most {MAX_JSON_KEYS}", param="body"
        )
    num_containers = bare.count(b"[") + bare.count(b"{")
    if num_containers > MAX_JSON_CONTAINERS:
        raise InvalidRequest(
            f"the body has {num_containers} lists and objects; allowed: at most "
            f"{MAX_JSON_CONTAINERS}",
            param="body",
        )
    depth = 0
    for bracket in _BRACKET.finditer(bare):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > MAX_JSON_DEPTH:
            raise InvalidRequest(
                f"the body is nested deeper than {MAX_JSON_DEPTH} levels; "
                f"allowed: at most {MAX_JSON_DEPTH}",
                param="body",
            )


def _wrong_type(exc: msgspec.ValidationError) -> InvalidRequest:
    message = str(exc)
    where = _FIELD_OF_PATH.search(message)
    param = where[1] if where is not None and where[1] else "body"
    reason = message[: where.start()] if where is not None else message
    return InvalidRequest(f"{param} has a wrong value: {reason}", param=param)


def _malformed(body: bytes, exc: msgspec.DecodeError) -> InvalidRequest:
    """The decoder's own words for these two would not help anyone."""
    number = _NOT_A_NUMBER.search(body)
    if number is not None:
        param = number[1].decode()
        return InvalidRequest(
            f"{param} is {number[2].decode()}, which JSON does not have; allowed: a number",
            param=param,
        )
    if _LONE_SURROGATE.search(body) is not None:
        return InvalidRequest(
            "the body has an escape of half a character (a lone surrogate, \\ud800 to \\udfff); "
            "allowed: text that UTF-8 can carry",
            param="body",
        )
    return InvalidRequest(f"the body is not JSON: {exc}", param="body")
