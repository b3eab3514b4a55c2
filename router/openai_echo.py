"""The prompt as a completion with ``echo`` shows it before its own text."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from baton.protocol.sampling import TokenLogprobs
from router import limits
from router.detokenizer import Detokenizer
from router.frontend import GenerateSpec, Token
from router.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Echo:
    """``token_texts``: what each prompt token adds to ``text``; empty without log-probabilities."""

    text: str
    token_texts: tuple[str, ...]

    def tokens(self, prompt_tokens: Sequence[Token], num_best: int) -> list[Token]:
        """``prompt_tokens`` with their texts, and no more alternatives than were asked for."""
        tokens = []
        for token, text in zip(prompt_tokens, self.token_texts, strict=True):
            logprobs = token.logprobs
            if logprobs is not None:
                logprobs = TokenLogprobs(logprobs.logprob, logprobs.top[:num_best])
            tokens.append(Token(token.token_id, text, logprobs))
        return tokens


async def echoes_of(specs: Sequence[GenerateSpec], tokenizer: Tokenizer) -> list[Echo]:
    """In a thread where it would keep streams waiting."""
    num_tokens = sum(len(spec.prompt_ids) for spec in specs)
    if num_tokens <= limits.INLINE_ECHO_IDS:
        return [_echo_of(spec, tokenizer) for spec in specs]
    return await asyncio.to_thread(lambda: [_echo_of(spec, tokenizer) for spec in specs])


def _echo_of(spec: GenerateSpec, tokenizer: Tokenizer) -> Echo:
    if spec.sampling.num_logprobs < 0:
        return Echo(tokenizer.decode(spec.prompt_ids, spec.skip_special_tokens), ())
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=spec.skip_special_tokens)
    *texts, last = detokenizer.push(spec.prompt_ids).texts
    texts.append(last + detokenizer.flush())
    return Echo("".join(texts), tuple(texts))
