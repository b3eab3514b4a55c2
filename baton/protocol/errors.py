"""Every error a user can meet. Standard library only: the SDK ships this file.

    BatonError
    |-- InvalidRequest            the caller's fault, never worth a retry
    |   |-- PromptTooLong
    |   `-- UnknownModel
    |-- Overloaded                shed on purpose, retry later
    |-- Unavailable               no worker can take it now, retry
    |-- DeadlineExceeded
    |-- Cancelled
    |-- RequestConflict           the request id is in use with another body
    |-- NotFound                  no such request
    |-- ConfigError               a YAML file or a checkpoint folder is wrong
    |   `-- UnsupportedModel      ... and the reason is one named field
    |-- PeerError                 the other side broke a promise (hop says which)
    |   |-- WireError             bytes that do not decode, or break a cap
    |   |-- IncompatiblePeer      refused in the hello
    |   |-- TransferFailed
    |   `-- RankLost              a rank of a tensor-parallel worker is gone: so is the worker
    `-- InternalError             our bug

An ``assert`` is our bug and never user-facing. Lower-level errors are mapped once,
at the seam where they enter (``raise ... from exc``).
"""

from __future__ import annotations

from typing import ClassVar

MAX_MESSAGE_CHARS = 2_000


class BatonError(Exception):
    """Base of all. ``code`` is stable; ``hop`` names the process role that failed."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"
    default_retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        hop: str = "",
        retryable: bool | None = None,
        param: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hop = hop
        self.retryable = self.default_retryable if retryable is None else retryable
        self.param = param
        self.request_id = request_id

    def __str__(self) -> str:
        where = f" [hop: {self.hop}]" if self.hop else ""
        return f"{self.message}{where}"


class InvalidRequest(BatonError):
    code = "invalid_request"
    http_status = 400
    grpc_status = "INVALID_ARGUMENT"


class PromptTooLong(InvalidRequest):
    code = "context_length_exceeded"


class UnknownModel(InvalidRequest):
    code = "model_not_found"
    http_status = 404
    grpc_status = "NOT_FOUND"


class NotFound(BatonError):
    code = "not_found"
    http_status = 404
    grpc_status = "NOT_FOUND"


class RequestConflict(BatonError):
    code = "request_conflict"
    http_status = 409
    grpc_status = "ALREADY_EXISTS"


class Overloaded(BatonError):
    code = "overloaded"
    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"
    default_retryable = True


class Unavailable(BatonError):
    code = "unavailable"
    http_status = 503
    grpc_status = "UNAVAILABLE"
    default_retryable = True


class DeadlineExceeded(BatonError):
    code = "deadline_exceeded"
    http_status = 504
    grpc_status = "DEADLINE_EXCEEDED"


class Cancelled(BatonError):
    code = "cancelled"
    http_status = 499
    grpc_status = "CANCELLED"


class ConfigError(BatonError):
    code = "config_error"
    http_status = 500
    grpc_status = "FAILED_PRECONDITION"


class UnsupportedModel(ConfigError):
    """A checkpoint folder that cannot be run; the message names the field."""

    code = "unsupported_model"


class PeerError(BatonError):
    code = "peer_error"
    http_status = 502
    grpc_status = "UNAVAILABLE"
    default_retryable = True


class WireError(PeerError):
    code = "wire_error"


class IncompatiblePeer(PeerError):
    code = "incompatible_peer"
    default_retryable = False
    grpc_status = "FAILED_PRECONDITION"


class TransferFailed(PeerError):
    code = "transfer_failed"


class RankLost(PeerError):
    code = "rank_lost"


class InternalError(BatonError):
    code = "internal"


def _tree(root: type[BatonError]) -> list[type[BatonError]]:
    return [root, *(leaf for sub in root.__subclasses__() for leaf in _tree(sub))]


ERRORS_BY_CODE: dict[str, type[BatonError]] = {cls.code: cls for cls in _tree(BatonError)}
"""Leaves come last: the code "internal" is InternalError's, not the base's."""


def from_code(
    code: str,
    message: str,
    *,
    hop: str = "",
    retryable: bool | None = None,
    param: str | None = None,
    request_id: str | None = None,
) -> BatonError:
    """Rebuild an error that crossed a wire; an unknown code becomes a plain BatonError."""
    cls = ERRORS_BY_CODE.get(code, BatonError)
    return cls(
        message[:MAX_MESSAGE_CHARS],
        hop=hop,
        retryable=retryable,
        param=param,
        request_id=request_id,
    )
