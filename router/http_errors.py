"""Errors as OpenAI-shaped bodies, with the hop that failed and whether a retry can help."""

from __future__ import annotations

import msgspec
from starlette.responses import Response

from baton.protocol.errors import BatonError, InternalError, InvalidRequest
from router.openai_types import ErrorBody, ErrorDetail

RETRY_AFTER_S = 1


class BodyTooLarge(InvalidRequest):
    http_status = 413


class BodyTooSlow(InvalidRequest):
    http_status = 408


class NoSuchRoute(InvalidRequest):
    code = "no_such_route"
    http_status = 404


class MethodNotAllowed(InvalidRequest):
    code = "method_not_allowed"
    http_status = 405


class UnsupportedMediaType(InvalidRequest):
    http_status = 415


def error_json(error: BatonError, request_id: str | None) -> bytes:
    """A ConfigError or InternalError of ours is not the client's fault and says so in type."""
    return msgspec.json.encode(
        ErrorBody(
            ErrorDetail(
                message=error.message,
                type=_type(error.http_status),
                param=error.param,
                code=error.code,
                hop=error.hop,
                retryable=error.retryable,
                request_id=error.request_id or request_id,
            )
        )
    )


def error_response(error: BatonError, request_id: str | None = None) -> Response:
    """429 and 503 carry Retry-After; x-should-retry is what the openai package looks at."""
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    if error.http_status in (429, 503):
        headers["retry-after"] = str(RETRY_AFTER_S)
    if isinstance(error, BodyTooLarge | BodyTooSlow):
        # The rest of the body may still be coming: it is not read any more.
        headers["connection"] = "close"
    return Response(
        error_json(error, request_id),
        status_code=error.http_status,
        headers=headers,
        media_type="application/json",
    )


def our_bug(request_id: str | None) -> InternalError:
    """For the client: nothing of what went wrong inside. The log has it."""
    return InternalError(
        "internal error; the router's log has the reason under this request id",
        hop="router",
        request_id=request_id,
    )


def _type(http_status: int) -> str:
    if http_status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if http_status < 499 else "server_error"
