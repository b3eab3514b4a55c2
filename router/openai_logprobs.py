"""Log-probabilities in the two shapes of the OpenAI interface.

A token that is no text of its own (a part of a UTF-8 character) is written as
``token_id:<id>``, so that entries of one position never fall together, and has no bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.frontend import Token
from router.openai_types import (
    ChatLogprobs,
    CompletionLogprobs,
    LogprobEntry,
    PromptLogprob,
    PromptLogprobs,
    TopLogprobEntry,
)
from router.tokenizer import Tokenizer


def completion_logprobs(
    tokens: Sequence[Token], tokenizer: Tokenizer, first_char: int, *, with_top: bool
) -> CompletionLogprobs:
    """``first_char``: characters of the completion before ``tokens``."""
    offsets, offset = [], first_char
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    top = [None if token.logprobs is None else _with_own(token, tokenizer) for token in tokens]
    return CompletionLogprobs(
        tokens=[label(tokenizer, token.token_id) for token in tokens],
        token_logprobs=[
            None if token.logprobs is None else token.logprobs.logprob for token in tokens
        ],
        top_logprobs=top if with_top else None,
        text_offset=offsets,
    )


def _with_own(token: Token, tokenizer: Tokenizer) -> dict[str, float]:
    """The best ones and the token itself, which need not be one of them."""
    assert token.logprobs is not None
    entries = {label(tokenizer, best.token_id): best.logprob for best in token.logprobs.top}
    entries.setdefault(label(tokenizer, token.token_id), token.logprobs.logprob)
    return entries


def chat_logprobs(tokens: Sequence[Token], tokenizer: Tokenizer) -> ChatLogprobs:
    # A token occurs often: its list of bytes is made once, and shared.
    known: dict[int, tuple[str, list[int] | None]] = {}

    def written(token_id: int) -> tuple[str, list[int] | None]:
        found = known.get(token_id)
        if found is None:
            text = label(tokenizer, token_id)
            found = known[token_id] = (text, _bytes(text, token_id))
        return found

    entries = []
    for token in tokens:
        top = []
        for best in token.logprobs.top if token.logprobs is not None else ():
            text, own_bytes = written(best.token_id)
            top.append(TopLogprobEntry(text, best.logprob, own_bytes))
        text, own_bytes = written(token.token_id)
        entries.append(LogprobEntry(text, _logprob(token), own_bytes, top))
    return ChatLogprobs(entries)


def prompt_logprobs(tokens: Sequence[Token], tokenizer: Tokenizer, num_best: int) -> PromptLogprobs:
    """``tokens``: the whole prompt; the first has no log-probability."""
    found: PromptLogprobs = []
    for token in tokens:
        if token.logprobs is None:
            found.append(None)
            continue
        own = PromptLogprob(token.logprobs.logprob, None, label(tokenizer, token.token_id))
        entries = {str(token.token_id): own}
        for rank, best in enumerate(token.logprobs.top[:num_best], start=1):
            text = label(tokenizer, best.token_id)
            entries[str(best.token_id)] = PromptLogprob(best.logprob, rank, text)
        found.append(entries)
    return found


def label(tokenizer: Tokenizer, token_id: int) -> str:
    text = tokenizer.token_text(token_id)
    return _id_label(token_id) if not text or "\ufffd" in text else text


def _id_label(token_id: int) -> str:
    return f"token_id:{token_id}"


def _bytes(text: str, token_id: int) -> list[int] | None:
    return None if text == _id_label(token_id) else list(text.encode())


def _logprob(token: Token) -> float:
    assert token.logprobs is not None, "the request asked for log-probabilities"
    return token.logprobs.logprob
