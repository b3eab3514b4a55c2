"""One HTTP answer as it grows: token counts, texts and ends of its choices. No I/O.

An answer has one or more prompts with n choices each; choice i of prompt p has the index
``p * n + i`` in the response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from baton.protocol.errors import InternalError
from router.frontend import FinishReason, GenerateSpec, Output, Token
from router.openai_echo import Echo
from router.openai_types import Usage


@dataclass(slots=True)
class Choice:
    num_prompt_tokens: int
    num_output_tokens: int = 0
    num_text_chars: int = 0
    """Of the tokens' own texts: offsets of log-probabilities count in these."""
    texts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    prompt_tokens: tuple[Token, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def usage(self) -> Usage:
        total = self.num_prompt_tokens + self.num_output_tokens
        return Usage(self.num_prompt_tokens, self.num_output_tokens, total)


class Answer:
    def __init__(
        self,
        specs: Sequence[GenerateSpec],
        *,
        answer_id: str,
        created_unix_s: int,
        model: str,
        echoes: Sequence[Echo] = (),
        num_prompt_logprobs: int = -1,
        scores_only: bool = False,
    ) -> None:
        """``specs``: one per prompt, alike but for the prompt.

        echoes: one per prompt, or none. num_prompt_logprobs: -1, or show those of the prompt,
        with so many alternatives. scores_only: no tokens were asked for, what is drawn is
        not shown.
        """
        self.id = answer_id
        self.created_unix_s = created_unix_s
        self.model = model
        self._sampling = specs[0].sampling
        self.num_logprobs = self._sampling.num_logprobs
        self.num_prompt_logprobs = num_prompt_logprobs
        self._echoes = echoes
        self._scores_only = scores_only
        self._n = specs[0].n
        self._num_prompt_tokens = sum(len(spec.prompt_ids) for spec in specs)
        self.choices = [Choice(len(spec.prompt_ids)) for spec in specs for _ in range(spec.n)]

    def echo(self, index: int) -> Echo | None:
        """Of choice ``index``."""
        return self._echoes[index // self._n] if self._echoes else None

    def shown(self, output: Output) -> Output:
        """``output`` without what the client did not ask for."""
        if not self._scores_only:
            return output
        finish_reason: FinishReason | None = "length" if output.finish_reason else None
        return replace(
            output,
            tokens=(),
            text="",
            num_output_tokens=0,
            finish_reason=finish_reason,
            stop_reason=None,
        )

    def count(self, prompt_index: int, output: Output) -> int:
        """Take note of ``output``; returns the index of its choice in the response."""
        index = prompt_index * self._n + output.index
        choice = self.choices[index]
        choice.num_output_tokens = output.num_output_tokens
        if output.prompt_tokens:
            choice.prompt_tokens = output.prompt_tokens
        if output.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = output.finish_reason, output.stop_reason
        return index

    def keep(self, index: int, output: Output) -> None:
        """Remember the content, for an answer that is sent whole."""
        choice = self.choices[index]
        choice.texts.append(output.text)
        if self.num_logprobs >= 0:
            choice.tokens.extend(output.tokens)

    def num_logprobs_of(self, tokens: Sequence[Token], prompt_tokens: Sequence[Token]) -> int:
        """What writing these out takes, in log-probabilities."""
        sampling = self._sampling
        of_tokens = len(tokens) * (sampling.num_logprobs + 1)
        return of_tokens + len(prompt_tokens) * (sampling.num_prompt_logprobs + 1)

    @property
    def num_logprobs_kept(self) -> int:
        return sum(self.num_logprobs_of(c.tokens, c.prompt_tokens) for c in self.choices)

    def check_complete(self) -> None:
        """A stream that just ends is a failure: it must never look like an answer."""
        missing = sum(choice.finish_reason is None for choice in self.choices)
        if missing:
            raise InternalError(
                f"{missing} of {len(self.choices)} choices ended without a finish reason",
                hop="router",
                retryable=True,
            )

    @property
    def usage(self) -> Usage:
        """A prompt counts once, however many choices continue it."""
        num_output_tokens = sum(choice.num_output_tokens for choice in self.choices)
        total = self._num_prompt_tokens + num_output_tokens
        return Usage(self._num_prompt_tokens, num_output_tokens, total)
