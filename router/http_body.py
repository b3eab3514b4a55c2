"""Reads one JSON body of bounded size within bounded time."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from baton.protocol.errors import Cancelled
from router.http_errors import BodyTooLarge, BodyTooSlow, UnsupportedMediaType
from router.limits import BODY_TIMEOUT_S, MAX_BODY_BYTES, MAX_DISCARDED_BYTES


async def read_json_body(request: Request) -> bytes:
    """Raises BodyTooLarge, BodyTooSlow, UnsupportedMediaType; Cancelled if the client left.

    Only application/json: a web page cannot send that to a router on localhost without
    asking first.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType(
            f"content-type is {media_type[:80]!r}; allowed: application/json",
            param="content-type",
        )
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await _read(request)
    except TimeoutError as exc:
        raise BodyTooSlow(
            f"the body did not arrive within {BODY_TIMEOUT_S:g} s", param="body"
        ) from exc
    except ClientDisconnect as exc:
        raise Cancelled("the client left while it sent the body", hop="client") from exc


async def _read(request: Request) -> bytes:
    """What is over the cap is dropped, not kept: most clients read no answer until they
    have sent everything.
    """
    body = bytearray()
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes <= MAX_BODY_BYTES:
            body += chunk
        elif num_bytes > MAX_DISCARDED_BYTES:
            break
    if num_bytes > MAX_BODY_BYTES:
        more = "at least " if num_bytes > MAX_DISCARDED_BYTES else ""
        raise BodyTooLarge(
            f"the body has {more}{num_bytes} bytes; allowed: at most {MAX_BODY_BYTES}",
            param="body",
        )
    return bytes(body)
