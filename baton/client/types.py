"""What the SDK hands out: frozen values, times in the units that their names say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, TypedDict

FinishReason = Literal["stop", "length"]


class ChatMessage(TypedDict):
    """``role`` is what the model's template knows, usually system, user or assistant."""

    role: str
    content: str


class Options(TypedDict, total=False):
    """How to generate. What is absent is the router's choice, named in parentheses."""

    max_tokens: int
    """Per choice (16; in a chat all the room that is left)."""
    temperature: float
    """0 is greedy (1)."""
    top_p: float
    """Share of probability mass kept, above 0, at most 1 (1)."""
    top_k: int
    """Number of most likely tokens kept, 0 for all (0)."""
    min_p: float
    """Keeps tokens of at least this share of the best one's probability (0)."""
    repetition_penalty: float
    """Above 1: tokens of prompt and output become less likely (1)."""
    presence_penalty: float
    """Off the logits of tokens that the output holds, once each (0)."""
    frequency_penalty: float
    """Off the logits of tokens that the output holds, times their count (0)."""
    logit_bias: Mapping[int, float]
    """By token id: what is added to its logit, -100 to 100."""
    allowed_token_ids: list[int] | tuple[int, ...]
    """Nothing else is drawn (all)."""
    bad_token_ids: list[int] | tuple[int, ...]
    """Never drawn."""
    bad_words: list[str] | tuple[str, ...]
    """Never completed, at the start of a text or behind a space."""
    min_tokens: int
    """Until so many tokens there is no EOS, no stop token and no stop string (0)."""
    json_schema: str | Mapping[str, object]
    """The text is JSON that conforms to this schema. Of this and the next four at most one."""
    json_object: bool
    """The text is a JSON object (False)."""
    regex: str
    """The whole text matches this regular expression, in Rust's syntax."""
    grammar: str
    """The text conforms to this grammar, in Lark or GBNF."""
    choice: list[str] | tuple[str, ...]
    """The text is one of these."""
    seed: int
    """Same seed, prompt and options: same tokens. Choice i draws with seed + i (random)."""
    n: int
    """Independent continuations (1)."""
    stop: str | list[str] | tuple[str, ...]
    """The text ends before the first of these."""
    stop_token_ids: list[int] | tuple[int, ...]
    """Generation ends after one of these."""
    logprobs: int
    """0: log-probabilities of the chosen tokens; k: also of the k best (none)."""
    prompt_logprobs: int
    """As ``logprobs``, of the prompt: see ``Choice.prompt_tokens`` (none)."""
    ignore_eos: bool
    """Go on behind an end-of-sequence token (False)."""
    skip_special_tokens: bool
    """Leave special tokens out of the text (True)."""
    priority: int
    """Greater goes first among waiting requests (0)."""
    cache_salt: str
    """Cached prompts are shared only among requests of the same salt (none, which share too)."""
    kv_quality: str
    """The least that the prompt's KV may be after it was handed over: "exact", "lossless", "high",
    "medium" or "low" (the cluster's)."""
    request_id: str
    """Idempotency key, also the name for ``abort`` (a fresh one)."""
    model: str
    """Checked against the name that the router serves (not checked)."""
    timeout: float | None
    """Seconds for the whole call, retries included (the client's)."""


@dataclass(frozen=True, slots=True)
class TopLogprob:
    token_id: int
    logprob: float
    text: str


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms, of the distribution before temperature; ``top`` best first."""

    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """``text`` is what this token alone adds; it may be empty inside a character."""

    token_id: int
    text: str
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Span:
    """One hop; ``start_ms`` counts from the request's arrival at the router."""

    name: str
    start_ms: float
    duration_ms: float
    attributes: Mapping[str, str | int | float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Timeline:
    """Where the time of a choice went; ``tpot_ms`` is None below two tokens."""

    spans: tuple[Span, ...]
    ttft_ms: float
    tpot_ms: float | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """News of one choice of a stream.

    seq: position of the first of ``tokens`` in the completion, without gaps per choice.
    text: to append. usage: of this choice so far.
    finish_reason, stop_reason, timeline: with the last chunk of this choice. stop_reason
      is the stop string or stop token id that was met, None for EOS or length.
    prompt_tokens: with the first chunk of a choice that asked for ``prompt_logprobs``.
    """

    request_id: str
    index: int
    seq: int
    tokens: tuple[Token, ...]
    text: str
    usage: Usage
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    timeline: Timeline | None = None
    prompt_tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """``prompt_tokens``: the whole prompt where ``prompt_logprobs`` were asked for, each token
    decoded on its own; the first has no log-probability."""

    index: int
    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    timeline: Timeline | None = None
    prompt_tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request. ``usage`` counts the prompt once and all choices' tokens."""

    request_id: str
    choices: tuple[Choice, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> FinishReason:
        """Of the first choice."""
        return self.choices[0].finish_reason


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """``max_model_len``: prompt plus completion, in tokens."""

    name: str
    architecture: str
    max_model_len: int
    vocab_size: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    created_unix_s: int


@dataclass(frozen=True, slots=True)
class KvLink:
    """What carries KV from a worker to ``peer``, and why; or, where ``peer`` is "", how much
    came in by that transport."""

    peer: str
    transport: str
    reason: str
    num_bytes: int
    codecs: str = ""
    """Where they are chosen: frames by choice, for people."""
    bytes_per_s: int = 0
    """Of the link, as estimated; coded bytes."""
    num_predicted: int = 0
    """Hand-overs whose end was predicted when they began to be sent."""
    predicted_s: float = 0.0
    actual_s: float = 0.0
    error_s: float = 0.0
    """Sum of what predictions were off by."""


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """A worker's last report of itself, ``age_s`` seconds old; counters since its start."""

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
    num_swapped_out: int
    num_cache_queried_tokens: int
    num_cache_hit_tokens: int
    num_draft_tokens: int
    num_accepted_draft_tokens: int
    kv_links: tuple[KvLink, ...] = ()


@dataclass(frozen=True, slots=True)
class Loads:
    """``num_queued`` requests have no first token yet, ``num_running`` have one."""

    num_queued: int
    num_running: int
    workers: tuple[WorkerLoad, ...]


class Health(StrEnum):
    """NOT_SERVING: the router lives, and no pair of workers can take a request."""

    SERVING = "serving"
    NOT_SERVING = "not_serving"
