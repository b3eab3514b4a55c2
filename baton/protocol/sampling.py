"""How a request wants its tokens drawn: the part of a request that travels to the workers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from baton.protocol.constraint import Constraint
from baton.protocol.errors import InvalidRequest

MAX_TOKENS_CAP = 1_000_000
MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_N = 16
MAX_SEED = 2**63 - 1
MAX_LOGIT_BIAS = 1_024
MAX_LISTED_TOKEN_IDS = 16_384
"""Of allowed_token_ids and of bad_token_ids."""
MAX_BAD_WORDS = 256
MAX_BAD_WORD_TOKENS = 64
MAX_BAD_WORD_CHARS = 256
MAX_PENALTY = 2.0
MAX_BIAS = 100.0
REPETITION_PENALTIES = (0.01, 100.0)
MAX_PROMPT_LOGPROB_ENTRIES = 32_768
"""Positions x (alternatives + 1): they travel in one message, and stay until acknowledged."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """``validate`` must have passed before one of these enters a queue.

    temperature: 0 is greedy. top_k: 0 keeps all. num_logprobs: -1 none, 0 the chosen
    token's alone, k also the k best. seed: with the position it keys the draw, so a
    continuation elsewhere draws the same. ``stop`` strings are the router's business
    (workers know token ids only) and are not carried to workers.

    min_p: keeps tokens of at least this share of the best one's probability. The
    repetition penalty counts prompt and output, presence and frequency the output alone.
    logit_bias: pairs (token id, bias). allowed_token_ids: empty allows all.
    bad_token_sequences: of two tokens or more; the last one is never drawn behind the
    others. min_tokens: until then neither EOS nor stop_token_ids are drawn.
    num_prompt_logprobs: as num_logprobs, of the prompt's own tokens but the first.
    constraint: structured output; when its text is complete, EOS is the only token left.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    num_logprobs: int = -1
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_token_ids: tuple[int, ...] = ()
    bad_token_sequences: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    num_prompt_logprobs: int = -1
    constraint: Constraint | None = None

    def validate(self) -> None:
        """Raise InvalidRequest that names the field, its value and what is allowed."""
        _check_in("max_tokens", self.max_tokens, 1, MAX_TOKENS_CAP)
        _check(
            "temperature",
            self.temperature,
            math.isfinite(self.temperature) and 0 <= self.temperature <= 100,
            "a number from 0 (greedy) to 100",
        )
        _check(
            "top_p",
            self.top_p,
            math.isfinite(self.top_p) and 0 < self.top_p <= 1,
            "above 0, at most 1",
        )
        _check("top_k", self.top_k, 0 <= self.top_k <= MAX_TOKENS_CAP, "0 (off) or more")
        _check_in("min_p", self.min_p, 0.0, 1.0)
        _check_in("seed", self.seed, 0, MAX_SEED)
        _check("logprobs", self.num_logprobs, *_num_logprobs(self.num_logprobs))
        _check(
            "prompt_logprobs", self.num_prompt_logprobs, *_num_logprobs(self.num_prompt_logprobs)
        )
        _check_in("repetition_penalty", self.repetition_penalty, *REPETITION_PENALTIES)
        _check_in("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        _check_in("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        _check(
            "min_tokens",
            self.min_tokens,
            0 <= self.min_tokens <= self.max_tokens,
            f"0 to max_tokens, which is {self.max_tokens}",
        )
        self._validate_lists()
        self._validate_constraint()

    def _validate_constraint(self) -> None:
        """A complete text ends the request: nothing may ask for more tokens then."""
        if self.constraint is None:
            return
        self.constraint.validate()
        if self.ignore_eos:
            raise InvalidRequest(
                "ignore_eos is true; allowed with structured output: false, for EOS ends it",
                param="ignore_eos",
            )
        _check("min_tokens", self.min_tokens, self.min_tokens == 0, "0 with structured output")

    def _validate_lists(self) -> None:
        _check_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        _check_ids("allowed_token_ids", self.allowed_token_ids, MAX_LISTED_TOKEN_IDS)
        _check_ids("bad_token_ids", self.bad_token_ids, MAX_LISTED_TOKEN_IDS)
        _check_ids("logit_bias", [i for i, _ in self.logit_bias], MAX_LOGIT_BIAS)
        for token_id, bias in self.logit_bias:
            _check_in(f"logit_bias[{token_id}]", bias, -MAX_BIAS, MAX_BIAS, param="logit_bias")
        if len({i for i, _ in self.logit_bias}) < len(self.logit_bias):
            raise InvalidRequest(
                "logit_bias names a token id twice; allowed: once each", param="logit_bias"
            )
        if len(self.bad_token_sequences) > 2 * MAX_BAD_WORDS:
            raise InvalidRequest(
                f"bad_words are {len(self.bad_token_sequences)} token sequences; allowed: at most "
                f"{2 * MAX_BAD_WORDS}",
                param="bad_words",
            )
        for sequence in self.bad_token_sequences:
            _check(
                "bad_words",
                f"a sequence of {len(sequence)} tokens",
                2 <= len(sequence) <= MAX_BAD_WORD_TOKENS and min(sequence) >= 0,
                f"words of at most {MAX_BAD_WORD_TOKENS} tokens, no id negative",
            )
        if self.allowed_token_ids:
            left = set(self.allowed_token_ids) - set(self.bad_token_ids)
            if self.min_tokens:
                left -= set(self.stop_token_ids)
            if not left:
                raise InvalidRequest(
                    "allowed_token_ids holds no token that bad_token_ids, bad_words and (with "
                    "min_tokens) stop_token_ids leave; allowed: at least one such token",
                    param="allowed_token_ids",
                )

    @property
    def max_listed_token_id(self) -> int:
        """The largest id that any field names, -1 for none: it must be in the vocabulary."""
        listed = (
            self.stop_token_ids,
            self.allowed_token_ids,
            self.bad_token_ids,
            [i for i, _ in self.logit_bias],
            *self.bad_token_sequences,
        )
        return max((max(ids) for ids in listed if ids), default=-1)


def _num_logprobs(value: int) -> tuple[bool, str]:
    return -1 <= value <= MAX_TOP_LOGPROBS, f"0 to {MAX_TOP_LOGPROBS}"


def _check_in(
    name: str, value: float, low: float, high: float, *, param: str | None = None
) -> None:
    """NaN lies in no interval."""
    if not low <= value <= high:
        raise InvalidRequest(f"{name} is {value}; allowed: {low} to {high}", param=param or name)


def _check_ids(param: str, ids: Sequence[int], most: int) -> None:
    _check(
        param,
        f"a list of {len(ids)}",
        len(ids) <= most and min(ids, default=0) >= 0,
        f"at most {most} ids, none negative",
    )


def _check(param: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise InvalidRequest(f"{param} is {value}; allowed: {allowed}", param=param)


class TopLogprob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    token_id: int
    logprob: float


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probabilities at one position, of the distribution before temperature."""

    logprob: float
    top: tuple[TopLogprob, ...] = ()
