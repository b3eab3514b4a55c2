"""From protobuf messages to the values of ``baton.client.types``; both clients share it."""

from __future__ import annotations

from baton.api.v1 import baton_pb2 as pb
from baton.client.types import (
    Choice,
    Chunk,
    Completion,
    FinishReason,
    KvLink,
    Loads,
    ModelInfo,
    Span,
    Timeline,
    Token,
    TokenLogprobs,
    TopLogprob,
    Usage,
    WorkerLoad,
)
from baton.protocol.errors import WireError

_FINISH_REASONS: dict[int, FinishReason] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
}


class Collector:
    """Joins the chunks of one request, and notices when the stream dropped some."""

    def __init__(self, num_choices: int) -> None:
        self._num_choices = num_choices
        self._chunks: dict[int, list[Chunk]] = {}

    @property
    def started(self) -> bool:
        """True once there was output: from then on a retry could repeat tokens."""
        return bool(self._chunks)

    def add(self, chunk: Chunk) -> None:
        """Raises WireError when tokens of a choice are missing or repeated."""
        chunks = self._chunks.setdefault(chunk.index, [])
        expected = sum(len(c.tokens) for c in chunks[-1:]) + (chunks[-1].seq if chunks else 0)
        if chunk.seq != expected:
            raise WireError(
                f"choice {chunk.index} goes on at token {chunk.seq}, expected {expected}",
                hop="router",
                request_id=chunk.request_id,
                retryable=False,
            )
        chunks.append(chunk)

    def completion(self) -> Completion:
        """Raises WireError when the stream ended before every choice had finished."""
        choices = tuple(_choice(self._chunks[index]) for index in sorted(self._chunks))
        finished = [choice for choice in choices if choice is not None]
        if len(finished) < max(self._num_choices, 1):
            raise WireError(
                f"the stream ended after {len(finished)} of {self._num_choices} choices",
                hop="router",
                retryable=not self.started,
            )
        last = [self._chunks[choice.index][-1] for choice in finished]
        return Completion(
            request_id=last[0].request_id,
            choices=tuple(finished),
            usage=Usage(last[0].usage.prompt_tokens, sum(c.usage.completion_tokens for c in last)),
        )


def _choice(chunks: list[Chunk]) -> Choice | None:
    last = chunks[-1]
    if last.finish_reason is None:
        return None
    return Choice(
        index=last.index,
        text="".join(chunk.text for chunk in chunks),
        tokens=tuple(token for chunk in chunks for token in chunk.tokens),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        timeline=last.timeline,
        prompt_tokens=chunks[0].prompt_tokens,
    )


def chunk(message: pb.GenerateResponse) -> Chunk:
    stop = message.WhichOneof("stop_reason")
    return Chunk(
        request_id=message.request_id,
        index=message.index,
        seq=message.seq,
        tokens=tuple(_token(token) for token in message.tokens),
        text=message.text,
        usage=Usage(message.usage.prompt_tokens, message.usage.completion_tokens),
        finish_reason=_FINISH_REASONS.get(message.finish_reason),
        stop_reason=getattr(message, stop) if stop else None,
        timeline=_timeline(message.timeline) if message.HasField("timeline") else None,
        prompt_tokens=tuple(_token(token) for token in message.prompt_tokens),
    )


def model_info(message: pb.GetModelInfoResponse) -> ModelInfo:
    return ModelInfo(
        name=message.name,
        architecture=message.architecture,
        max_model_len=message.max_model_len,
        vocab_size=message.vocab_size,
        dtype=message.dtype,
        eos_token_ids=tuple(message.eos_token_ids),
        created_unix_s=message.created_unix_s,
    )


def loads(message: pb.GetLoadsResponse) -> Loads:
    return Loads(
        num_queued=message.num_queued,
        num_running=message.num_running,
        workers=tuple(_worker_load(worker) for worker in message.workers),
    )


def _token(message: pb.Token) -> Token:
    if not message.HasField("logprobs"):
        return Token(message.token_id, message.text)
    top = tuple(TopLogprob(t.token_id, t.logprob, t.text) for t in message.logprobs.top)
    return Token(message.token_id, message.text, TokenLogprobs(message.logprobs.logprob, top))


def _timeline(message: pb.Timeline) -> Timeline:
    return Timeline(
        spans=tuple(
            Span(
                span.name,
                span.start_ms,
                span.duration_ms,
                {name: _attribute(value) for name, value in span.attributes.items()},
            )
            for span in message.spans
        ),
        ttft_ms=message.ttft_ms,
        tpot_ms=message.tpot_ms if message.HasField("tpot_ms") else None,
    )


def _attribute(message: pb.AttributeValue) -> str | int | float:
    kind = message.WhichOneof("value")
    value: str | int | float = getattr(message, kind) if kind else ""
    return value


def _worker_load(message: pb.WorkerLoad) -> WorkerLoad:
    return WorkerLoad(
        worker_id=message.worker_id,
        incarnation=message.incarnation,
        role=message.role,
        state=message.state,
        address=message.address,
        num_running=message.num_running,
        num_waiting=message.num_waiting,
        num_blocks=message.num_blocks,
        num_free_blocks=message.num_free_blocks,
        num_parked=message.num_parked,
        num_preemptions=message.num_preemptions,
        num_backpressured=message.num_backpressured,
        kv_bytes_sent=message.kv_bytes_sent,
        kv_bytes_received=message.kv_bytes_received,
        kv_transport=message.kv_transport,
        num_leases=message.num_leases,
        num_tasks=message.num_tasks,
        integrity_errors=tuple(message.integrity_errors),
        step_count=message.step_count,
        age_s=message.age_s,
        num_swapped_out=message.num_swapped_out,
        num_cache_queried_tokens=message.num_cache_queried_tokens,
        num_cache_hit_tokens=message.num_cache_hit_tokens,
        num_draft_tokens=message.num_draft_tokens,
        num_accepted_draft_tokens=message.num_accepted_draft_tokens,
        kv_links=tuple(
            KvLink(
                link.peer,
                link.transport,
                link.reason,
                link.num_bytes,
                link.codecs,
                link.bytes_per_s,
                link.num_predicted,
                link.predicted_s,
                link.actual_s,
                link.error_s,
            )
            for link in message.kv_links
        ),
    )
