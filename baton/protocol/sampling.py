"""How a request wants its tokens drawn: the part of a request that travels to the workers."""

from __future__ import annotations

import math

import msgspec

from baton.protocol.errors import InvalidRequest

MAX_TOKENS_CAP = 1_000_000
MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_N = 16
MAX_SEED = 2**63 - 1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """``validate`` must have passed before one of these enters a queue.

    temperature: 0 is greedy. top_k: 0 keeps all. num_logprobs: -1 none, 0 the chosen
    token's alone, k also the k best. seed: with the position it keys the draw, so a
    continuation elsewhere draws the same. ``stop`` strings are the router's business
    (workers know token ids only) and are not carried to workers.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    num_logprobs: int = -1
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def validate(self) -> None:
        """Raise InvalidRequest that names the field, its value and what is allowed."""
        _check(
            "max_tokens",
            self.max_tokens,
            1 <= self.max_tokens <= MAX_TOKENS_CAP,
            f"1 to {MAX_TOKENS_CAP}",
        )
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
        _check("seed", self.seed, 0 <= self.seed <= MAX_SEED, f"0 to {MAX_SEED}")
        _check(
            "logprobs",
            self.num_logprobs,
            -1 <= self.num_logprobs <= MAX_TOP_LOGPROBS,
            f"0 to {MAX_TOP_LOGPROBS}",
        )
        _check(
            "stop_token_ids",
            len(self.stop_token_ids),
            len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS
            and all(t >= 0 for t in self.stop_token_ids),
            f"at most {MAX_STOP_TOKEN_IDS} ids, none negative",
        )


def _check(param: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise InvalidRequest(f"{param} is {value}; allowed: {allowed}", param=param)


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, of the distribution before temperature."""

    logprob: float
    top: tuple[TopLogprob, ...] = ()
