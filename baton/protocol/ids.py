"""Names of things that cross process borders. Standard library only."""

from __future__ import annotations

import re
import secrets
from typing import NewType

RequestId = NewType("RequestId", str)
"""Chosen by the client (an idempotency key) or by the router; unique per router."""

WorkerId = NewType("WorkerId", str)
"""Stable name of a place in a pool, such as ``p-0``; survives restarts."""

RouterId = NewType("RouterId", str)

Incarnation = NewType("Incarnation", str)
"""Random per process start: a peer is (worker id, incarnation), never its address alone."""

TransferId = NewType("TransferId", str)
"""One hand-over of one request's KV: ``request_id/attempt``."""

MAX_REQUEST_ID_CHARS = 128
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]+")


def new_request_id() -> RequestId:
    return RequestId(f"req-{secrets.token_hex(10)}")


def new_incarnation() -> Incarnation:
    return Incarnation(secrets.token_hex(8))


def transfer_id(request_id: RequestId, attempt: int) -> TransferId:
    return TransferId(f"{request_id}/{attempt}")


def is_valid_request_id(text: str) -> bool:
    """True for 1 to 128 characters of ``A-Z a-z 0-9 . _ : -``."""
    return len(text) <= MAX_REQUEST_ID_CHARS and _REQUEST_ID.fullmatch(text) is not None
