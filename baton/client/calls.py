"""Settings that both clients give to gRPC, and one call's timing."""

from __future__ import annotations

import time

from baton.api.v1 import baton_pb2 as pb
from baton.client.retry import Retry
from baton.client.types import Health
from baton.protocol.errors import InvalidRequest

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_MAX_RETRIES = 2

SMALL_CALL_TIMEOUT_S = 30.0
"""For calls that compute nothing. Generation without a timeout has the router's."""

MAX_RECEIVE_BYTES = 32 * 2**20

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
    # Retries are ours: they stop at the first output.
    ("grpc.enable_retries", 0),
    # A router that died without a word is noticed within 40 s, also by a silent stream.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Also the time that connecting itself may take.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]

HEALTH_METHOD = "/grpc.health.v1.Health/Check"
EMPTY_HEALTH_REQUEST = b""
"""HealthCheckRequest for the server as a whole: its one field is unset."""

_HEALTH_ANSWER_SERVING = b"\x08\x01"
"""HealthCheckResponse with field 1, status, at 1. The SDK does without that package."""


def health(answer: bytes) -> Health:
    return Health.SERVING if answer == _HEALTH_ANSWER_SERVING else Health.NOT_SERVING


def check_timeout(timeout_s: float | None) -> float | None:
    """Raises InvalidRequest for what is no time to wait."""
    if timeout_s is not None and not timeout_s > 0:
        raise InvalidRequest(
            f"timeout is {timeout_s}; allowed: seconds above 0, or None for the default",
            param="timeout",
            hop="client",
        )
    return timeout_s


def new_retry(max_retries: int, timeout_s: float | None) -> Retry:
    return Retry(max_retries, None if timeout_s is None else time.monotonic() + timeout_s)


def rpc_timeout_s(remaining_s: float | None) -> float | None:
    """The router ends a request at its timeout and says where it was; the call waits a
    little longer for that answer than the request may take."""
    return None if remaining_s is None else remaining_s + min(1.0, remaining_s)


def num_choices(request: pb.GenerateRequest | pb.ChatRequest) -> int:
    return request.sampling_params.n or 1


def small_call_timeout_s(of_call: float | None, of_client: float | None) -> float:
    return check_timeout(of_call) or of_client or SMALL_CALL_TIMEOUT_S
