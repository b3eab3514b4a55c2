"""The bodies of the OpenAI-compatible HTTP interface, as structs.

Requests: every field but the prompt may be absent or null, unknown fields are ignored.
Responses: a field that is UNSET is left out, None is written as null.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from router.openai_structured import StructuredFields


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class CommonRequest(StructuredFields, frozen=True, kw_only=True):
    """What both kinds of completion share. ``timeout_s``, ``priority``, ``request_id``,
    ``kv_quality`` and ``bad_token_ids`` are Baton's own; ``top_k``, ``min_p``,
    ``repetition_penalty``, ``ignore_eos``, ``min_tokens``, ``stop_token_ids``,
    ``allowed_token_ids``, ``bad_words``, ``prompt_logprobs``, ``skip_special_tokens`` and
    ``cache_salt`` are what vLLM takes as well.
    """

    model: str | None = None
    request_id: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    allowed_token_ids: list[int] | None = None
    bad_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    kv_quality: str | None = None
    timeout_s: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def num_tokens_asked(self) -> int | None:
        """The newer name wins."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage is True

    @property
    def wants_usage_in_every_chunk(self) -> bool:
        options = self.stream_options
        return self.wants_usage and options is not None and options.continuous_usage_stats is True


class CompletionRequest(CommonRequest, frozen=True, kw_only=True):
    prompt: str | list[str | int | list[int]] | None = None
    logprobs: int | None = None
    echo: bool | None = None


class ContentPart(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None


class RequestMessage(msgspec.Struct, frozen=True):
    role: str
    content: str | list[ContentPart] | None = None


class ChatRequest(CommonRequest, frozen=True, kw_only=True):
    messages: list[RequestMessage] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


FinishReason = Literal["stop", "length"]


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Four lists of one length. ``text_offset`` counts characters of the choice's text.

    None stands at the first token of an echoed prompt, which nothing predicts.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class PromptLogprob(msgspec.Struct, frozen=True, gc=False):
    """``rank``: 1 for the most likely; None for a prompt token outside the alternatives."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""Per prompt token: by token id, of itself and of the alternatives; None for the first."""


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """Also one chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | None = None


class TopLogprobEntry(msgspec.Struct, frozen=True, gc=False):
    token: str
    logprob: float
    bytes: list[int] | None


class LogprobEntry(msgspec.Struct, frozen=True, gc=False):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprobEntry]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[LogprobEntry]
    refusal: None = None


class AnswerMessage(msgspec.Struct, frozen=True):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Delta(msgspec.Struct, frozen=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | None = None


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "baton"
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's four fields, then which hop failed and whether a retry can help."""

    message: str
    type: str
    param: str | None
    code: str
    hop: str
    retryable: bool
    request_id: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorDetail
