"""Typed reads of a JSON object from outside; errors name the file, the field and its value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from baton.protocol.errors import ConfigError, UnsupportedModel

MAX_JSON_BYTES = 64 * 2**20
MAX_SHOWN_CHARS = 120


def read_json_object(path: Path) -> dict[str, object]:
    """The object in ``path``. Raises ConfigError when it is absent, too big or not an object."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ConfigError(f"{path}: {size} bytes; allowed: {MAX_JSON_BYTES} at most")
        loaded = json.loads(path.read_bytes())
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{path}: is not valid JSON ({exc})") from exc
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: must hold one JSON object, holds a {type(loaded).__name__}")
    return loaded


def show(value: object) -> str:
    """``value`` as JSON, cut to what a message can carry."""
    text = json.dumps(value, default=str)
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "..."


@dataclass(frozen=True, slots=True)
class Fields:
    """One JSON object; ``where`` names it in errors (a file, or ``file: outer_field``)."""

    where: str
    values: dict[str, object]

    def has(self, name: str) -> bool:
        """True when the field is present and not null."""
        return self.values.get(name) is not None

    def malformed(self, name: str, allowed: str) -> NoReturn:
        if name not in self.values:
            raise ConfigError(f"{self.where}: {name} is missing; expected {allowed}", param=name)
        shown = show(self.values[name])
        raise ConfigError(f"{self.where}: {name} is {shown}; expected {allowed}", param=name)

    def unsupported(self, name: str, supported: str) -> NoReturn:
        shown = show(self.values.get(name))
        raise UnsupportedModel(
            f"{self.where}: {name} is {shown}; supported: {supported}", param=name
        )

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """Raises ConfigError when absent without a default, not an integer, or out of range."""
        if default is not None and not self.has(name):
            return default
        value = self.values.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        return self.malformed(name, f"an integer from {low} to {high}")

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """Like ``integer``, for a finite number."""
        if default is not None and not self.has(name):
            return default
        value = self.values.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
            return float(value)
        return self.malformed(name, f"a number from {low:g} to {high:g}")

    def numbers(self, name: str, low: float, high: float, count: int) -> tuple[float, ...]:
        """A list of ``count`` numbers, each from low to high. Raises ConfigError otherwise."""
        value = self.values.get(name)
        items = value if isinstance(value, list) else []
        found = tuple(
            float(item)
            for item in items
            if isinstance(item, int | float) and not isinstance(item, bool) and low <= item <= high
        )
        if len(found) != count or len(items) != count:
            self.malformed(name, f"a list of {count} numbers from {low:g} to {high:g}")
        return found

    def boolean(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        return value if isinstance(value, bool) else self.malformed(name, "true or false")

    def integers(self, name: str, low: int, high: int) -> tuple[int, ...]:
        """A list of integers, each from low to high; empty when absent or null."""
        value = self.values.get(name)
        if value is None:
            return ()
        items = value if isinstance(value, list) else [value]
        found = tuple(
            item
            for item in items
            if isinstance(item, int) and not isinstance(item, bool) and low <= item <= high
        )
        if not isinstance(value, list) or len(found) != len(items):
            self.malformed(name, f"a list of integers from {low} to {high}")
        return found

    def text(self, name: str) -> str | None:
        """None when absent or null."""
        value = self.values.get(name)
        if value is None or isinstance(value, str):
            return value
        return self.malformed(name, "a string")

    def texts(self, name: str) -> tuple[str, ...] | None:
        """A list of strings; None when absent or null."""
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        return self.malformed(name, "a list of strings")

    def inner(self, name: str) -> Fields | None:
        """An object inside this one; None when absent or null."""
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, dict):
            return Fields(f"{self.where}: {name}", value)
        return self.malformed(name, "an object")

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """An id or a list of ids; empty when absent or null."""
        value = self.values.get(name)
        if value is None:
            return ()
        items: Sequence[object] = value if isinstance(value, list) else [value]
        if any(
            isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < vocab_size
            for item in items
        ):
            self.malformed(name, f"token ids from 0 to {vocab_size - 1} (vocab_size - 1)")
        return tuple(dict.fromkeys(item for item in items if isinstance(item, int)))
