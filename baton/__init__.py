"""Baton: disaggregated prefill and decode serving. ``baton.Client`` talks to a router.

Names load at first use, so that the servers, which import ``baton.protocol``, load no gRPC
and the SDK loads nothing of the servers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from baton.client import (
        AsyncClient,
        AsyncStream,
        ChatMessage,
        Choice,
        Chunk,
        Client,
        Completion,
        Stream,
    )
    from baton.protocol.errors import BatonError

_HOMES = {
    "AsyncClient": "baton.client",
    "AsyncStream": "baton.client",
    "BatonError": "baton.protocol.errors",
    "ChatMessage": "baton.client",
    "Choice": "baton.client",
    "Chunk": "baton.client",
    "Client": "baton.client",
    "Completion": "baton.client",
    "Stream": "baton.client",
}

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "BatonError",
    "ChatMessage",
    "Choice",
    "Chunk",
    "Client",
    "Completion",
    "Stream",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'baton' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
