"""The two shapes of an answer: text completion and chat completion, whole or in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from router.frontend import Output, Token
from router.openai_answer import Answer
from router.openai_logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from router.openai_types import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    PromptLogprobs,
    Usage,
)
from router.tokenizer import Tokenizer

ChunkUsage = Usage | UnsetType | None
"""UNSET where the client did not ask for usage: the field is then left out."""


class AnswerFormat(Protocol):
    def chunks(self, index: int, output: Output, usage: ChunkUsage) -> Sequence[msgspec.Struct]:
        """What a stream says of ``output``, which belongs to choice ``index``."""
        ...

    def usage_chunk(self) -> msgspec.Struct:
        """The last chunk: usage of all choices, and no choice."""
        ...

    def whole(self) -> msgspec.Struct: ...


class CompletionFormat:
    def __init__(self, answer: Answer, tokenizer: Tokenizer) -> None:
        self._answer = answer
        self._tokenizer = tokenizer
        self._opened: set[int] = set()

    def chunks(self, index: int, output: Output, usage: ChunkUsage) -> Sequence[msgspec.Struct]:
        """An echoed prompt comes with a choice's first text."""
        text, tokens = ("", []) if index in self._opened else self._echoed(index)
        self._opened.add(index)
        choice = CompletionChoice(
            index=index,
            text=text + output.text,
            logprobs=self._logprobs(index, [*tokens, *output.tokens]),
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )
        return [self._completion([choice], usage)]

    def usage_chunk(self) -> msgspec.Struct:
        return self._completion([], self._answer.usage)

    def whole(self) -> msgspec.Struct:
        choices = []
        for index, choice in enumerate(self._answer.choices):
            text, tokens = self._echoed(index)
            choices.append(
                CompletionChoice(
                    index=index,
                    text=text + "".join(choice.texts),
                    logprobs=self._logprobs(index, [*tokens, *choice.tokens]),
                    finish_reason=choice.finish_reason,
                    stop_reason=choice.stop_reason,
                    prompt_logprobs=_prompt_logprobs(self._answer, index, self._tokenizer),
                )
            )
        return self._completion(choices, self._answer.usage)

    def _echoed(self, index: int) -> tuple[str, list[Token]]:
        echo = self._answer.echo(index)
        if echo is None:
            return "", []
        if self._answer.num_logprobs < 0:
            return echo.text, []
        prompt_tokens = self._answer.choices[index].prompt_tokens
        return echo.text, echo.tokens(prompt_tokens, self._answer.num_logprobs)

    def _completion(self, choices: list[CompletionChoice], usage: ChunkUsage) -> Completion:
        return Completion(
            id=self._answer.id,
            created=self._answer.created_unix_s,
            model=self._answer.model,
            choices=choices,
            usage=usage,
        )

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> CompletionLogprobs | None:
        if self._answer.num_logprobs < 0:
            return None
        choice = self._answer.choices[index]
        first_char = choice.num_text_chars
        choice.num_text_chars += sum(len(token.text) for token in tokens)
        with_top = self._answer.num_logprobs > 0
        return completion_logprobs(tokens, self._tokenizer, first_char, with_top=with_top)


class ChatFormat:
    def __init__(self, answer: Answer, tokenizer: Tokenizer) -> None:
        self._answer = answer
        self._tokenizer = tokenizer
        self._opened: set[int] = set()

    def chunks(self, index: int, output: Output, usage: ChunkUsage) -> Sequence[msgspec.Struct]:
        """Before a choice's first text comes a chunk that tells the role."""
        chunks = []
        if index not in self._opened:
            self._opened.add(index)
            opening = ChatChunkChoice(index, Delta(role="assistant", content=""), None, None)
            chunks.append(self._chunk([opening], UNSET if usage is UNSET else None))
        choice = ChatChunkChoice(
            index=index,
            delta=Delta(content=output.text),
            logprobs=self._logprobs(output.tokens),
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )
        chunks.append(self._chunk([choice], usage))
        return chunks

    def usage_chunk(self) -> msgspec.Struct:
        return self._chunk([], self._answer.usage)

    def whole(self) -> msgspec.Struct:
        choices = [
            ChatChoice(
                index=index,
                message=AnswerMessage("".join(choice.texts)),
                logprobs=self._logprobs(choice.tokens),
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
            )
            for index, choice in enumerate(self._answer.choices)
        ]
        return ChatCompletion(
            id=self._answer.id,
            created=self._answer.created_unix_s,
            model=self._answer.model,
            choices=choices,
            usage=self._answer.usage,
            prompt_logprobs=_prompt_logprobs(self._answer, 0, self._tokenizer),
        )

    def _chunk(self, choices: list[ChatChunkChoice], usage: ChunkUsage) -> ChatChunk:
        return ChatChunk(
            id=self._answer.id,
            created=self._answer.created_unix_s,
            model=self._answer.model,
            choices=choices,
            usage=usage,
        )

    def _logprobs(self, tokens: Sequence[Token]) -> ChatLogprobs | None:
        if self._answer.num_logprobs < 0:
            return None
        return chat_logprobs(tokens, self._tokenizer)


def _prompt_logprobs(
    answer: Answer, index: int, tokenizer: Tokenizer
) -> PromptLogprobs | UnsetType:
    if answer.num_prompt_logprobs < 0:
        return UNSET
    tokens = answer.choices[index].prompt_tokens
    return prompt_logprobs(tokens, tokenizer, answer.num_prompt_logprobs)
