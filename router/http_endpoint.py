"""Around every HTTP handler: the request id, and errors as bodies instead of exceptions."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from baton.protocol.errors import BatonError, InvalidRequest
from baton.protocol.ids import MAX_REQUEST_ID_CHARS, is_valid_request_id, new_request_id
from router.field_checks import shown
from router.http_errors import error_response, our_bug

_LOG = logging.getLogger(__name__)
_HEADER = "x-request-id"

Handler = Callable[[Request], Awaitable[ASGIApp]]


def endpoint(handler: Handler) -> Handler:
    """What ``handler`` raises becomes a response; nothing of our insides gets out."""

    async def handle(request: Request) -> ASGIApp:
        try:
            response = await handler(request)
        except BatonError as exc:
            return _failed(request, exc)
        except Exception as exc:
            _LOG.error("%s %s failed", request.method, request.url.path, exc_info=exc)
            return _failed(request, our_bug(_valid_header(request)))
        return response

    return handle


def request_id_of(request: Request, in_body: str | None) -> str:
    """The header's, else the body's, else a new one. Raises InvalidRequest.

    It is the request's idempotency key: what the client sends is used as it is.
    """
    request_id = request.headers.get(_HEADER, in_body)
    if request_id is None:
        return new_request_id()
    if not is_valid_request_id(request_id):
        raise InvalidRequest(
            f"{_HEADER} is {shown(request_id)}; allowed: 1 to {MAX_REQUEST_ID_CHARS} characters "
            "of A-Z a-z 0-9 . _ : -",
            param="request_id",
        )
    return request_id


def _failed(request: Request, error: BatonError) -> Response:
    request_id = _valid_header(request) or error.request_id
    response = error_response(error, request_id)
    if request_id is not None:
        response.headers[_HEADER] = request_id
    return response


def _valid_header(request: Request) -> str | None:
    """Only a well-formed id is sent back: a header is not to carry what others wrote."""
    request_id = request.headers.get(_HEADER)
    return request_id if request_id is not None and is_valid_request_id(request_id) else None
