"""Walks a YAML tree along the msgspec structs and notes every mismatch, not only the first.

Knows the kinds of types that ``baton.protocol.config`` uses and nothing of its fields, so a
new field needs no line here. A part that is wrong is left out of the result.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec.inspect as mi
import yaml

from cluster.problems import Problem
from cluster.schema_words import describe
from cluster.yaml_tree import kind_of, line_of

MAX_VALUE_CHARS = 80
BAD: Final = object()
"""Stands for a value that could not be used; its problem is noted."""

_EXPONENT_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")


@dataclass
class Walk:
    """``problems`` and, for each path that occurs in the file, its line."""

    file: str
    problems: list[Problem] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)

    def value(self, node: yaml.Node, wanted: mi.Type, path: str) -> Any:
        """Plain data for ``msgspec.convert``, or BAD."""
        self.lines[path] = line_of(node)
        if isinstance(wanted, mi.Metadata):
            wanted = wanted.type
        if isinstance(wanted, mi.UnionType):
            return self._union(node, wanted, path)
        if isinstance(wanted, mi.StructType) and isinstance(node, yaml.MappingNode):
            return self._struct(node, wanted, path)
        if isinstance(wanted, mi.DictType) and isinstance(node, yaml.MappingNode):
            return self._dict(node, wanted, path)
        if isinstance(wanted, mi.VarTupleType) and isinstance(node, yaml.SequenceNode):
            return self._tuple(node, wanted, path)
        if isinstance(node, yaml.ScalarNode):
            scalar = _scalar(node, wanted)
            if scalar is not BAD and _fits(scalar, wanted):
                return scalar
        return self._bad(node, path, f"is {_shown(node)}; allowed: {describe(wanted)}")

    def nearest_line(self, path: str) -> int:
        """The line of ``path``, or of the closest part around it that the file has."""
        while path not in self.lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.lines[path]

    def _union(self, node: yaml.Node, wanted: mi.UnionType, path: str) -> Any:
        # A mapping can only be meant as the union's struct, a list as its tuple: their own
        # problems say more than "fits none of these".
        for option in wanted.types:
            bare = option.type if isinstance(option, mi.Metadata) else option
            if (isinstance(bare, mi.StructType) and isinstance(node, yaml.MappingNode)) or (
                isinstance(bare, mi.VarTupleType) and isinstance(node, yaml.SequenceNode)
            ):
                return self.value(node, bare, path)
            if isinstance(node, yaml.ScalarNode):
                scalar = _scalar(node, bare)
                if scalar is not BAD and _fits(scalar, bare):
                    return scalar
        return self._bad(node, path, f"is {_shown(node)}; allowed: {describe(wanted)}")

    def _struct(self, node: yaml.MappingNode, wanted: mi.StructType, path: str) -> dict[str, Any]:
        known = {item.encode_name: item for item in wanted.fields}
        result: dict[str, Any] = {}
        found = set()
        for key, key_node, value_node in self._items(node, path):
            found.add(key)
            inner = f"{path}.{key}" if path else key
            if key not in known:
                self._bad(key_node, inner, f"unknown key; {_nearest(key, list(known))}")
                continue
            value = self.value(value_node, known[key].type, inner)
            self.lines[inner] = line_of(key_node)
            if value is not BAD:
                result[key] = value
        for name, item in known.items():
            if item.required and name not in found:
                inner = f"{path}.{name}" if path else name
                self._bad(node, inner, f"is missing; allowed: {describe(item.type)}")
        return result

    def _dict(self, node: yaml.MappingNode, wanted: mi.DictType, path: str) -> dict[str, Any]:
        items = {
            key: self.value(value_node, wanted.value_type, f"{path}.{key}")
            for key, _, value_node in self._items(node, path)
        }
        return {key: value for key, value in items.items() if value is not BAD}

    def _tuple(self, node: yaml.SequenceNode, wanted: mi.VarTupleType, path: str) -> Any:
        least, most = wanted.min_length or 0, wanted.max_length
        if len(node.value) < least or (most is not None and len(node.value) > most):
            return self._bad(
                node, path, f"has {len(node.value)} entries; allowed: {describe(wanted)}"
            )
        # A bad entry stays in its place, so that the indexes of the others hold.
        return [
            self.value(item, wanted.item_type, f"{path}[{index}]")
            for index, item in enumerate(node.value)
        ]

    def _items(self, node: yaml.MappingNode, path: str) -> list[tuple[str, yaml.Node, yaml.Node]]:
        """Keys that are text and occur once; the others are noted."""
        items: dict[str, tuple[str, yaml.Node, yaml.Node]] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._bad(key_node, path, f"a {kind_of(key_node)} is used as a key; keys are words")
                continue
            key = str(key_node.value)
            if key in items:
                first = line_of(items[key][1])
                inner = f"{path}.{key}" if path else key
                self._bad(key_node, inner, f"is given twice, first on line {first}; keep one")
                continue
            items[key] = (key, key_node, value_node)
        return list(items.values())

    def _bad(self, node: yaml.Node, path: str, message: str) -> Any:
        self.problems.append(Problem(self.file, line_of(node), path, message))
        return BAD


def _scalar(node: yaml.ScalarNode, wanted: mi.Type) -> Any:
    """The node's value in the type YAML reads it as; BAD where it reads as none of ours."""
    kind = node.tag.rpartition(":")[2]
    text = str(node.value)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in ("true", "yes", "on")
    if kind == "str":
        is_float = isinstance(wanted, mi.FloatType) and node.style is None
        # YAML 1.1 reads 1e3, without a dot, as text.
        return float(text) if is_float and _EXPONENT_NUMBER.fullmatch(text) else text
    # Base 60 (1:30 is 90 to YAML 1.1) is never meant; an int of 5,000 digits neither.
    if kind in ("int", "float") and ":" not in text and len(text) <= MAX_VALUE_CHARS:
        try:
            return yaml.SafeLoader("").construct_object(node)
        except (ValueError, yaml.YAMLError):
            return BAD
    return BAD


def _fits(value: Any, wanted: mi.Type) -> bool:
    match wanted:
        case mi.NoneType():
            return value is None
        case mi.BoolType():
            return isinstance(value, bool)
        case mi.LiteralType(values=values):
            return any(value == option and type(value) is type(option) for option in values)
        case mi.StrType():
            return isinstance(value, str) and _length_fits(value, wanted)
        case mi.IntType():
            return type(value) is int and _in_range(value, wanted)
        case mi.FloatType():
            return type(value) in (int, float) and math.isfinite(value) and _in_range(value, wanted)
    return False


def _length_fits(value: str, wanted: mi.StrType) -> bool:
    fits = (wanted.min_length or 0) <= len(value)
    if wanted.max_length is not None:
        fits = fits and len(value) <= wanted.max_length
    return fits and (wanted.pattern is None or re.search(wanted.pattern, value) is not None)


def _in_range(value: float, wanted: mi.IntType | mi.FloatType) -> bool:
    return (
        (wanted.ge is None or value >= wanted.ge)
        and (wanted.gt is None or value > wanted.gt)
        and (wanted.le is None or value <= wanted.le)
        and (wanted.lt is None or value < wanted.lt)
    )


def _shown(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        return f"a {kind_of(node)}"
    if node.tag.endswith(":null"):
        return "empty"
    text = str(node.value)
    text = text if len(text) <= MAX_VALUE_CHARS else f"{text[:MAX_VALUE_CHARS]}..."
    return repr(text) if node.tag.endswith(":str") else text


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
