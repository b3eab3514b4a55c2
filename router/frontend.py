"""The seam between the front ends (gRPC, HTTP) and the router core.

The servers translate their protocol into a ``GenerateSpec``, iterate the ``Output``s and
translate those back. They hold no request state of their own. The core owns ids,
admission, placement, streams and recovery.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from baton.protocol.ids import RequestId
from baton.protocol.messages import KvLink
from baton.protocol.sampling import SamplingParams, TokenLogprobs

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class GenerateSpec:
    """One validated request: ``router.validation`` makes these and nobody else.

    prompt_ids: 1 to max_model_len - 1 token ids, all inside the vocabulary.
    n: independent continuations; choice i draws with seed + i.
    timeout_s: from arrival, all hops together; the deadline travels with the request.
    cache_salt: cached prompts are shared among requests of the same salt; "" is one too.
    kv_quality: the floor of what hand-overs may do to its KV; "" leaves it to the workers.
    """

    request_id: RequestId
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    n: int = 1
    stop: tuple[str, ...] = ()
    priority: int = 0
    timeout_s: float = 600.0
    skip_special_tokens: bool = True
    cache_salt: str = ""
    kv_quality: str = ""


@dataclass(frozen=True, slots=True)
class Span:
    """One hop of a request; offsets count from the request's arrival at the router."""

    name: str
    start_ms: float
    duration_ms: float
    attributes: dict[str, str | int | float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Timeline:
    """queued, prefill, first_token, transfer, decode, in order; what did not happen is absent."""

    spans: tuple[Span, ...]
    ttft_ms: float
    tpot_ms: float | None


@dataclass(frozen=True, slots=True)
class Token:
    """``text`` is what this one token adds (may be empty inside a UTF-8 sequence)."""

    token_id: int
    text: str
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """News of one choice. Outputs of one choice carry rising ``seq`` without gaps.

    seq: number of the first token in ``tokens`` (0-based position in the completion).
    text: new text after stop-string handling: at most the tokens' text, held back while a
      stop string may be beginning, cut where one was found.
    finish_reason: set on the last output of a choice; ``stop_reason`` then tells the stop
      string or stop token id, None for EOS or length.
    timeline: with the finish of a choice.
    prompt_tokens: with the first output of a choice that asked for prompt_logprobs, the whole
      prompt; without texts, and the first token without log-probability.
    """

    request_id: RequestId
    index: int
    seq: int
    tokens: tuple[Token, ...]
    text: str
    num_prompt_tokens: int
    num_output_tokens: int
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    timeline: Timeline | None = None
    prompt_tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What a worker last said of itself (GetLoads, ``baton status``, /metrics)."""

    worker_id: str
    incarnation: str
    role: str
    state: str
    address: str
    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_parked: int
    num_preemptions: int
    num_backpressured: int
    kv_bytes_sent: int
    kv_bytes_received: int
    kv_transport: str
    num_leases: int
    num_tasks: int
    integrity_errors: tuple[str, ...]
    step_count: int
    age_s: float
    """Seconds since the report."""
    num_swapped_out: int
    num_cache_queried_tokens: int
    num_cache_hit_tokens: int
    num_draft_tokens: int
    num_accepted_draft_tokens: int
    kv_links: tuple[KvLink, ...] = ()


@dataclass(frozen=True, slots=True)
class Loads:
    """``queued`` have no first token yet, ``running`` have one."""

    num_queued: int
    num_running: int
    workers: tuple[WorkerLoad, ...]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    name: str
    architecture: str
    max_model_len: int
    vocab_size: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    created_unix_s: int


class Frontend(Protocol):
    """What a server may ask of the core. All errors are BatonErrors."""

    @property
    def model(self) -> ModelInfo: ...

    def generate(self, spec: GenerateSpec) -> AsyncIterator[Output]:
        """Admit at the first ``anext`` and stream until every choice has finished.

        Closing the iterator (``aclose``, or cancelling its consumer) aborts the request in
        every process that holds something of it. Raises Overloaded, Unavailable,
        DeadlineExceeded, RequestConflict, PeerError before or between outputs.
        """
        ...

    def abort(self, request_id: RequestId) -> bool:
        """True if the request was known and running; its stream then raises Cancelled."""
        ...

    def loads(self) -> Loads: ...

    def ready(self) -> str | None:
        """None when at least one pair of workers can serve, else the reason."""
        ...
