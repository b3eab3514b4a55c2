"""From a failed gRPC call to the BatonError that says which hop failed, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from baton.api.v1 import baton_pb2 as pb
from baton.protocol import errors
from baton.protocol.errors import BatonError

DETAIL_KEY = "baton-error-bin"


def explain(call: grpc.RpcError, address: str, method: str, timeout_s: float | None) -> BatonError:
    """What the router itself said if it said something, else what the status means.

    ``hop`` is ``client`` where the call never reached a router, or the answer never came.
    """
    code: grpc.StatusCode = call.code()
    details: str = call.details() or ""
    said = _router_said(call.trailing_metadata() or ())
    if said is not None:
        return said
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            return errors.Unavailable(
                f"no Baton router answers at {address} ({details}). Is `baton serve` running, "
                "and is this its gRPC port?",
                hop="client",
            )
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            after = "in time" if timeout_s is None else f"within timeout={timeout_s:g} s"
            return errors.DeadlineExceeded(
                f"{method} at {address} did not finish {after}; allow more, or ask for fewer "
                "tokens",
                hop="client",
            )
        case grpc.StatusCode.CANCELLED:
            return errors.Cancelled(f"{method} was cancelled ({details})", hop="client")
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in details:
            return errors.InvalidRequest(
                f"{method}: a message is over the size cap ({details}); send a shorter prompt",
                hop="client",
            )
        case grpc.StatusCode.UNIMPLEMENTED:
            return errors.IncompatiblePeer(
                f"{address} does not offer {method} ({details}): another service, or an older "
                "Baton; upgrade it, or install the baton-client of its version",
                hop="client",
            )
    return _by_status(code)(
        f"{method} at {address} failed with {code.name}: {details}", hop="router"
    )


def _router_said(metadata: Iterable[Any]) -> BatonError | None:
    for key, value in metadata:
        if key != DETAIL_KEY or not isinstance(value, bytes):
            continue
        try:
            detail = pb.ErrorDetail.FromString(value)
        except DecodeError:
            return None
        return errors.from_code(
            detail.code,
            detail.message,
            hop=detail.hop,
            retryable=detail.retryable,
            param=detail.param if detail.HasField("param") else None,
            request_id=detail.request_id if detail.HasField("request_id") else None,
        )
    return None


def _by_status(code: grpc.StatusCode) -> type[BatonError]:
    """For answers without a detail: a proxy's, or gRPC's own."""
    by_status: dict[str, type[BatonError]] = {
        "INVALID_ARGUMENT": errors.InvalidRequest,
        "NOT_FOUND": errors.NotFound,
        "ALREADY_EXISTS": errors.RequestConflict,
        "RESOURCE_EXHAUSTED": errors.Overloaded,
        "FAILED_PRECONDITION": errors.ConfigError,
        "INTERNAL": errors.InternalError,
    }
    return by_status.get(code.name, BatonError)
