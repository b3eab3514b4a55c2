"""Between the messages of ``baton.v1`` and the structs of the router. Nothing here judges
a value: that is ``router.validation``'s."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from baton.api.v1 import baton_pb2 as pb
from baton.protocol.constraint import Constraint
from baton.protocol.errors import BatonError
from baton.protocol.sampling import TokenLogprobs
from router.chat_template import ChatMessage
from router.frontend import Loads, ModelInfo, Output, Timeline, Token, WorkerLoad
from router.raw_request import RawRequest
from router.structured_output import choice, json_object

MAX_STATUS_BYTES = 500
MAX_DETAIL_BYTES = 2_000
"""Both together, escaped, stay below the 8 KiB of metadata that a gRPC client takes."""

_FINISH_REASONS = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}

DecodeToken = Callable[[int], str]


def raw_request(request: pb.GenerateRequest | pb.ChatRequest) -> RawRequest:
    """What is absent, or empty where empty means absent, becomes None."""
    sampling = request.sampling_params
    prompt, prompt_ids, messages = None, None, None
    if isinstance(request, pb.ChatRequest):
        messages = chat_messages(request.messages)
    elif request.HasField("text"):
        prompt = request.text
    elif request.HasField("token_ids"):
        prompt_ids = tuple(request.token_ids.ids)
    return RawRequest(
        model=request.model or None,
        request_id=request.request_id or None,
        prompt=prompt,
        prompt_ids=prompt_ids,
        messages=messages,
        max_tokens=sampling.max_tokens if sampling.HasField("max_tokens") else None,
        temperature=sampling.temperature if sampling.HasField("temperature") else None,
        top_p=sampling.top_p if sampling.HasField("top_p") else None,
        top_k=sampling.top_k if sampling.HasField("top_k") else None,
        seed=sampling.seed if sampling.HasField("seed") else None,
        n=sampling.n if sampling.HasField("n") else None,
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        ignore_eos=sampling.ignore_eos,
        priority=request.priority,
        timeout_s=request.timeout_s if request.HasField("timeout_s") else None,
        skip_special_tokens=(
            sampling.skip_special_tokens if sampling.HasField("skip_special_tokens") else None
        ),
        min_p=sampling.min_p if sampling.HasField("min_p") else None,
        repetition_penalty=(
            sampling.repetition_penalty if sampling.HasField("repetition_penalty") else None
        ),
        presence_penalty=(
            sampling.presence_penalty if sampling.HasField("presence_penalty") else None
        ),
        frequency_penalty=(
            sampling.frequency_penalty if sampling.HasField("frequency_penalty") else None
        ),
        logit_bias=dict(sampling.logit_bias),
        allowed_token_ids=tuple(sampling.allowed_token_ids),
        bad_token_ids=tuple(sampling.bad_token_ids),
        bad_words=tuple(sampling.bad_words),
        min_tokens=sampling.min_tokens if sampling.HasField("min_tokens") else None,
        prompt_logprobs=sampling.prompt_logprobs if sampling.HasField("prompt_logprobs") else None,
        constraint=constraint_of(sampling),
        cache_salt=request.cache_salt if request.HasField("cache_salt") else None,
        kv_quality=request.kv_quality if request.HasField("kv_quality") else None,
    )


def constraint_of(sampling: pb.SamplingParams) -> Constraint | None:
    match sampling.WhichOneof("structured_output"):
        case "json_schema":
            return Constraint("json_schema", sampling.json_schema)
        case "regex":
            return Constraint("regex", sampling.regex)
        case "grammar":
            return Constraint("grammar", sampling.grammar)
        case "choice":
            return choice(sampling.choice.texts)
        case "json_object":
            return json_object() if sampling.json_object else None
    return None


def chat_messages(messages: Iterable[pb.ChatMessage]) -> tuple[ChatMessage, ...]:
    return tuple(ChatMessage(message.role, message.content) for message in messages)


def generate_response(output: Output, decode_token: DecodeToken) -> pb.GenerateResponse:
    """``decode_token`` gives the texts of alternatives, when log-probabilities are on."""
    response = pb.GenerateResponse(
        request_id=output.request_id,
        index=output.index,
        seq=output.seq,
        tokens=[_token(token, decode_token) for token in output.tokens],
        text=output.text,
        usage=pb.Usage(
            prompt_tokens=output.num_prompt_tokens, completion_tokens=output.num_output_tokens
        ),
        timeline=None if output.timeline is None else _timeline(output.timeline),
        prompt_tokens=[
            pb.Token(
                token_id=token.token_id,
                text=decode_token(token.token_id),
                logprobs=None
                if token.logprobs is None
                else _logprobs(token.logprobs, decode_token),
            )
            for token in output.prompt_tokens
        ],
    )
    if output.finish_reason is not None:
        response.finish_reason = _FINISH_REASONS[output.finish_reason]
    if isinstance(output.stop_reason, str):
        response.stop_string = output.stop_reason
    elif output.stop_reason is not None:
        response.stop_token_id = output.stop_reason
    return response


def model_info(model: ModelInfo) -> pb.GetModelInfoResponse:
    return pb.GetModelInfoResponse(
        name=model.name,
        architecture=model.architecture,
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        dtype=model.dtype,
        eos_token_ids=model.eos_token_ids,
        created_unix_s=model.created_unix_s,
    )


def loads(value: Loads) -> pb.GetLoadsResponse:
    return pb.GetLoadsResponse(
        num_queued=value.num_queued,
        num_running=value.num_running,
        workers=[_worker_load(worker) for worker in value.workers],
    )


def error_detail(error: BatonError) -> pb.ErrorDetail:
    return pb.ErrorDetail(
        code=error.code,
        message=cut(error.message, MAX_DETAIL_BYTES),
        hop=error.hop,
        retryable=error.retryable,
        param=error.param,
        request_id=error.request_id,
    )


def cut(text: str, max_bytes: int) -> str:
    """The longest beginning of ``text`` that fits, in UTF-8; never half a character."""
    encoded = text.encode("utf-8", "replace")
    return encoded[:max_bytes].decode("utf-8", "ignore")


def _token(token: Token, decode_token: DecodeToken) -> pb.Token:
    logprobs = None if token.logprobs is None else _logprobs(token.logprobs, decode_token)
    return pb.Token(token_id=token.token_id, text=token.text, logprobs=logprobs)


def _logprobs(logprobs: TokenLogprobs, decode_token: DecodeToken) -> pb.TokenLogprobs:
    top = [
        pb.TopLogprob(
            token_id=best.token_id, logprob=best.logprob, text=decode_token(best.token_id)
        )
        for best in logprobs.top
    ]
    return pb.TokenLogprobs(logprob=logprobs.logprob, top=top)


def _timeline(timeline: Timeline) -> pb.Timeline:
    spans = [
        pb.Span(
            name=span.name,
            start_ms=span.start_ms,
            duration_ms=span.duration_ms,
            attributes={name: _attribute(value) for name, value in span.attributes.items()},
        )
        for span in timeline.spans
    ]
    return pb.Timeline(spans=spans, ttft_ms=timeline.ttft_ms, tpot_ms=timeline.tpot_ms)


def _attribute(value: str | int | float) -> pb.AttributeValue:
    if isinstance(value, str):
        return pb.AttributeValue(text=value)
    if isinstance(value, int):
        return pb.AttributeValue(integer=value)
    return pb.AttributeValue(real=value)


def _worker_load(load: WorkerLoad) -> pb.WorkerLoad:
    return pb.WorkerLoad(
        worker_id=load.worker_id,
        incarnation=load.incarnation,
        role=load.role,
        state=load.state,
        address=load.address,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_blocks=load.num_blocks,
        num_free_blocks=load.num_free_blocks,
        num_parked=load.num_parked,
        num_preemptions=load.num_preemptions,
        num_backpressured=load.num_backpressured,
        kv_bytes_sent=load.kv_bytes_sent,
        kv_bytes_received=load.kv_bytes_received,
        kv_transport=load.kv_transport,
        num_leases=load.num_leases,
        num_tasks=load.num_tasks,
        integrity_errors=load.integrity_errors,
        step_count=load.step_count,
        age_s=load.age_s,
        num_swapped_out=load.num_swapped_out,
        num_cache_queried_tokens=load.num_cache_queried_tokens,
        num_cache_hit_tokens=load.num_cache_hit_tokens,
        num_draft_tokens=load.num_draft_tokens,
        num_accepted_draft_tokens=load.num_accepted_draft_tokens,
        kv_links=[
            pb.KvLink(
                peer=link.peer,
                transport=link.transport,
                reason=link.reason,
                num_bytes=link.num_bytes,
                codecs=link.codecs,
                bytes_per_s=link.bytes_per_s,
                num_predicted=link.num_predicted,
                predicted_s=link.predicted_s,
                actual_s=link.actual_s,
                error_s=link.error_s,
            )
            for link in load.kv_links
        ],
    )
