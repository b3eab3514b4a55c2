"""What a server read off its wire, before anybody judged it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from baton.protocol.constraint import Constraint
from router.chat_template import ChatMessage


@dataclass(frozen=True, slots=True)
class RawRequest:
    """None where the client said nothing.

    logprobs, prompt_logprobs: None off, 0 the chosen token's, k also the k best.
    top_k: -1 and 0 are off. bad_words: texts.
    """

    model: str | None = None
    request_id: str | None = None
    prompt: str | None = None
    prompt_ids: Sequence[int] | None = None
    messages: Sequence[ChatMessage] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    n: int | None = None
    stop: Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    logprobs: int | None = None
    ignore_eos: bool | None = None
    priority: int | None = None
    timeout_s: float | None = None
    skip_special_tokens: bool | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None
    cache_salt: str | None = None
    kv_quality: str | None = None

    @property
    def num_text_chars(self) -> int:
        """Characters that will have to be tokenised."""
        texts = [self.prompt or "", *(m.content for m in self.messages or ())]
        return sum(map(len, texts)) + sum(len(str(word)) for word in self.bad_words or ())
