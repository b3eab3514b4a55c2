"""The part of a request that says how to draw: from a ``RawRequest`` to ``SamplingParams``.

Ranges are judged by ``SamplingParams.validate``; here types, the vocabulary, and what is said
in words.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from baton.protocol.errors import InvalidRequest
from baton.protocol.sampling import (
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS,
    MAX_LISTED_TOKEN_IDS,
    MAX_LOGIT_BIAS,
    MAX_PROMPT_LOGPROB_ENTRIES,
    MAX_SEED,
    MAX_STOP_TOKEN_IDS,
    MAX_TOKENS_CAP,
    MAX_TOP_LOGPROBS,
    SamplingParams,
)
from router.field_checks import check_text, flag, integer, number, shown
from router.frontend import ModelInfo
from router.raw_request import RawRequest
from router.structured_output import checked
from router.tokenizer import Tokenizer


def sampling_params(
    raw: RawRequest, n: int, model: ModelInfo, tokenizer: Tokenizer
) -> SamplingParams:
    """With the highest ``max_tokens``, as the real one depends on the prompt.

    Raises InvalidRequest.
    """
    bad_ids, bad_sequences = _bad_words(raw.bad_words or (), model, tokenizer)
    params = SamplingParams(
        max_tokens=MAX_TOKENS_CAP,
        temperature=number("temperature", raw.temperature, 1.0),
        top_p=number("top_p", raw.top_p, 1.0),
        top_k=max(integer("top_k", raw.top_k, 0, -1, MAX_TOKENS_CAP), 0),
        min_p=number("min_p", raw.min_p, 0.0),
        seed=_seed(raw.seed, n),
        num_logprobs=_num_logprobs("logprobs", raw.logprobs),
        num_prompt_logprobs=_num_logprobs("prompt_logprobs", raw.prompt_logprobs),
        ignore_eos=flag("ignore_eos", raw.ignore_eos, False),
        min_tokens=integer("min_tokens", raw.min_tokens, 0, 0, MAX_TOKENS_CAP),
        repetition_penalty=number("repetition_penalty", raw.repetition_penalty, 1.0),
        presence_penalty=number("presence_penalty", raw.presence_penalty, 0.0),
        frequency_penalty=number("frequency_penalty", raw.frequency_penalty, 0.0),
        logit_bias=_logit_bias(raw, model),
        stop_token_ids=_ids("stop_token_ids", raw.stop_token_ids, MAX_STOP_TOKEN_IDS, model),
        allowed_token_ids=_ids(
            "allowed_token_ids", raw.allowed_token_ids, MAX_LISTED_TOKEN_IDS, model
        ),
        bad_token_ids=_merged(
            _ids("bad_token_ids", raw.bad_token_ids, MAX_LISTED_TOKEN_IDS, model), bad_ids
        ),
        bad_token_sequences=bad_sequences,
        constraint=None if raw.constraint is None else checked(raw.constraint),
    )
    params.validate()
    _check_something_is_left(params, model)
    return params


def check_against_prompt(params: SamplingParams, num_prompt_tokens: int) -> None:
    """``params`` with their real max_tokens. Raises InvalidRequest."""
    params.validate()
    num_entries = (num_prompt_tokens - 1) * (params.num_prompt_logprobs + 1)
    if num_entries > MAX_PROMPT_LOGPROB_ENTRIES:
        raise InvalidRequest(
            f"prompt_logprobs is {params.num_prompt_logprobs} and the prompt has "
            f"{num_prompt_tokens} tokens: {num_entries} log-probabilities; allowed: at most "
            f"{MAX_PROMPT_LOGPROB_ENTRIES}",
            param="prompt_logprobs",
        )


def token_ids(param: str, ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    for index, token_id in enumerate(ids):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"{param}[{index}] is {shown(token_id)}; allowed: token ids 0 to {vocab_size - 1}",
                param=param,
            )
    return tuple(ids)


def _ids(param: str, ids: Sequence[int] | None, most: int, model: ModelInfo) -> tuple[int, ...]:
    ids = ids or ()
    _check_count(param, len(ids), most, "ids")
    return token_ids(param, ids, model.vocab_size)


def _check_count(param: str, count: int, most: int, unit: str) -> None:
    if count > most:
        raise InvalidRequest(
            f"{param} has {count} {unit}; allowed: at most {most} {unit}", param=param
        )


def _num_logprobs(param: str, value: int | None) -> int:
    return -1 if value is None else integer(param, value, 0, 0, MAX_TOP_LOGPROBS)


def _seed(value: int | None, n: int) -> int:
    """Choice i draws with seed + i, so the last one must still be a seed."""
    highest = MAX_SEED - (n - 1)
    return integer("seed", value, secrets.randbelow(highest + 1), 0, highest)


def _logit_bias(raw: RawRequest, model: ModelInfo) -> tuple[tuple[int, float], ...]:
    bias = raw.logit_bias or {}
    _check_count("logit_bias", len(bias), MAX_LOGIT_BIAS, "tokens")
    for token_id in bias:
        if type(token_id) is not int or not 0 <= token_id < model.vocab_size:
            raise InvalidRequest(
                f"logit_bias names token {shown(token_id)}; allowed: token ids 0 to "
                f"{model.vocab_size - 1}",
                param="logit_bias",
            )
    return tuple(
        (token_id, number("logit_bias", value, 0.0)) for token_id, value in sorted(bias.items())
    )


def _bad_words(
    words: Sequence[str], model: ModelInfo, tokenizer: Tokenizer
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """(single tokens, sequences of several) that spell the words.

    A word is tokenised at the start of a text and behind a space: most vocabularies have
    other tokens for the two. Other ways to cut a word into tokens stay open to the model.
    """
    _check_count("bad_words", len(words), MAX_BAD_WORDS, "words")
    spellings: dict[tuple[int, ...], None] = {}
    for index, word in enumerate(words):
        if not isinstance(word, str) or not 1 <= len(word) <= MAX_BAD_WORD_CHARS:
            raise InvalidRequest(
                f"bad_words[{index}] is {shown(word)}; allowed: text of 1 to "
                f"{MAX_BAD_WORD_CHARS} characters",
                param="bad_words",
            )
        check_text(f"bad_words[{index}]", word, param="bad_words")
        bare = word.lstrip(" ") or word
        for text in (bare, f" {bare}"):
            spellings[tuple(tokenizer.encode(text, add_special_tokens=False))] = None
    known = [ids for ids in spellings if ids and max(ids) < model.vocab_size]
    singles = tuple(ids[0] for ids in known if len(ids) == 1)
    return singles, tuple(ids for ids in known if len(ids) > 1)


def _merged(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys((*first, *second)))


def _check_something_is_left(params: SamplingParams, model: ModelInfo) -> None:
    """What ``validate`` cannot know: the vocabulary and its EOS."""
    bad = set(params.bad_token_ids)
    if not params.allowed_token_ids and len(bad) >= model.vocab_size:
        raise InvalidRequest(
            f"bad_token_ids holds the whole vocabulary of {model.vocab_size}; allowed: lists that "
            "leave a token to draw",
            param="bad_token_ids",
        )
    ends = {*model.eos_token_ids, *params.stop_token_ids}
    others = set(params.allowed_token_ids) - bad - ends
    if params.min_tokens and params.allowed_token_ids and not others:
        raise InvalidRequest(
            f"min_tokens is {params.min_tokens}, and allowed_token_ids holds nothing but tokens "
            "that end the answer; allowed: at least one other token",
            param="min_tokens",
        )
