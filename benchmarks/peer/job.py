"""What the benchmark tells its client process, and what comes back. JSON lines on pipes."""

from __future__ import annotations

import msgspec

MAX_LINE_BYTES = 64 * 2**20


class Job(msgspec.Struct, frozen=True):
    """``bodies``: OpenAI completion requests as JSON, sent by ``concurrency`` clients in turn."""

    host: str
    port: int
    bodies: tuple[bytes, ...]
    concurrency: int
    timeout_s: float


class Answered(msgspec.Struct, frozen=True):
    """One request; seconds from the start of the job, on the client's clock.

    token_times_s: one per token; the tokens of one event share a time.
    error: "" for a complete answer.
    """

    sent_s: float
    token_times_s: tuple[float, ...] = ()
    text: str = ""
    error: str = ""


class Done(msgspec.Struct, frozen=True):
    """In the order of the bodies."""

    answers: tuple[Answered, ...]
