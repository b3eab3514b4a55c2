"""Hypothesis strategies for every message between processes, drawn from their annotations."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args, get_origin

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

from baton.protocol.layout import DTYPE_BYTES, KvLayout
from baton.protocol.messages import AnyMessage, Message

KINDS: tuple[type[Message], ...] = get_args(AnyMessage)
MAX_ITEMS = 4
FAMILIAR = ("r", "s", "r/0", "s/0", "r/1", "router-0")
"""Strings that are drawn often, so that ids in different messages meet."""
assert get_origin(AnyMessage) is not None


def messages(kind: type[Message] | None = None) -> st.SearchStrategy[Any]:
    """Well-typed messages: within each field's bounds, strings and tuples short."""
    return st.one_of([_of(inspect.type_info(k)) for k in ([kind] if kind else KINDS)])


def _of(info: inspect.Type) -> st.SearchStrategy[Any]:
    match info:
        case inspect.IntType():
            low = -(2**63) if info.ge is None else info.ge
            high = 2**63 - 1 if info.le is None else info.le
            if info.lt is not None:
                high = info.lt - 1
            return st.integers(low, high) | st.integers(max(low, 0), min(high, 8))
        case inspect.FloatType():
            bounded = info.le is not None
            return st.floats(info.ge, info.le, allow_nan=False, allow_infinity=not bounded)
        case inspect.StrType():
            text = st.text(min_size=info.min_length or 0, max_size=12)
            return st.sampled_from(FAMILIAR) | text
        case inspect.LiteralType():
            return st.sampled_from(info.values)
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.VarTupleType():
            return st.lists(_of(info.item_type), max_size=MAX_ITEMS).map(tuple)
        case inspect.TupleType():
            return st.tuples(*map(_of, info.item_types))
        case inspect.UnionType():
            return st.one_of([_of(t) for t in info.types])
        case inspect.Metadata():
            return _of(info.type)
        case inspect.StructType():
            return _struct(info.cls)
    raise AssertionError(f"no strategy for {info!r}")


LAYOUTS = st.lists(st.none() | st.integers(1, 9), min_size=1, max_size=MAX_ITEMS).flatmap(
    lambda windows: st.builds(
        KvLayout.uniform,
        num_layers=st.just(len(windows)),
        num_kv_heads=st.integers(1, 8),
        head_dim=st.integers(1, 8),
        dtype=st.sampled_from(list(DTYPE_BYTES)),
        model_digest=st.text(max_size=12),
        arithmetic=st.text(max_size=12),
        windows=st.just(windows),
    )
)
"""Not any fields are a layout."""


@cache
def _struct(cls: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    if cls is KvLayout:
        return LAYOUTS
    info = inspect.type_info(cls)
    assert isinstance(info, inspect.StructType)
    return st.builds(cls, **{field.name: _of(field.type) for field in info.fields})
