"""Checks of single fields: each raises InvalidRequest with field, value and what is allowed."""

from __future__ import annotations

import math

from baton.protocol.errors import InvalidRequest


def shown(value: object, max_chars: int = 80) -> str:
    """A short repr: values come from outside and may be huge."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    text = repr(value[:max_chars] if isinstance(value, str) else value)
    return text if len(text) <= max_chars else f"{text[:max_chars]}..."


def integer(param: str, value: int | None, default: int, low: int, high: int) -> int:
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        raise InvalidRequest(
            f"{param} is {shown(value)}; allowed: whole numbers {low} to {high}", param=param
        )
    return value


def number(param: str, value: float | None, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{param} is {shown(value)}; allowed: a number", param=param)
    try:
        return float(value)
    except OverflowError:
        return math.inf


def flag(param: str, value: bool | None, default: bool) -> bool:
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"{param} is {shown(value)}; allowed: true or false", param=param)
    return default if value is None else value


def check_text(where: str, text: str, param: str | None = None) -> None:
    """Lone surrogates come from escapes such as "\\ud800": they are not text."""
    if not isinstance(text, str):
        raise InvalidRequest(f"{where} is {shown(text)}; allowed: text", param=param or where)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise InvalidRequest(
            f"{where} is not valid Unicode: lone surrogate at character {exc.start}; allowed: "
            "text that UTF-8 can carry",
            param=param or where,
        ) from exc
