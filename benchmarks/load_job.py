"""What the benchmark tells its load client, and what comes back. JSON lines on pipes."""

from __future__ import annotations

import msgspec

MAX_LINE_BYTES = 256 * 2**20


class PlannedRequest(msgspec.Struct, frozen=True):
    """``message``: a serialised GenerateRequest, sent at ``at_s`` after the start."""

    at_s: float
    message: bytes
    is_measured: bool


class Job(msgspec.Struct, frozen=True):
    address: str
    timeout_s: float
    requests: tuple[PlannedRequest, ...]


class RequestRecord(msgspec.Struct, frozen=True):
    """Times in seconds from the start of the job, on the client's clock.

    arrival_s: when the request was due; ``sent_s`` is later by the client's own delay.
    token_times_s: one per token; the tokens of one message share a time.
    error: the code of a BatonError, "" for a complete answer.
    hop_ms: duration of each span that the router reported.
    """

    arrival_s: float
    sent_s: float
    is_measured: bool
    token_times_s: tuple[float, ...] = ()
    error: str = ""
    hop_ms: dict[str, float] = msgspec.field(default_factory=dict)


class Started(msgspec.Struct, frozen=True, tag="started"):
    """The first line of an answer: the clock of the job runs now."""


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The last line; a request that was not measured and still ran is not in it."""

    records: tuple[RequestRecord, ...]


Reply = Started | Done
