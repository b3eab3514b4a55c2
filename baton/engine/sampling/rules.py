"""What one sequence's parameters forbid or shift, ready to be applied at every step.

All of it follows from the parameters, the prompt and the output so far, so nothing of it has
to travel: another worker, or this one after a preemption, builds the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from baton.engine.sampling.rows import SampleRow
from baton.engine.sampling.seen_tokens import Ints, SeenTokens
from baton.protocol.sampling import SamplingParams

_NONE: Ints = np.empty(0, dtype=np.int64)


def has_rules(params: SamplingParams) -> bool:
    return bool(
        has_penalties(params)
        or params.logit_bias
        or params.allowed_token_ids
        or params.bad_token_ids
        or params.bad_token_sequences
        or params.min_tokens
    )


def has_penalties(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
    )


class SequenceRules:
    """State of one sequence: ``seen`` grows with its output, the rest is constant."""

    def __init__(self, row: SampleRow, eos_token_ids: Sequence[int]) -> None:
        params = row.params
        self._params = params
        self._prompt_ids = row.prompt_ids
        self._num_counted = 0
        self.seen: SeenTokens | None = None
        if has_penalties(params):
            self.seen = SeenTokens(row.prompt_ids if params.repetition_penalty != 1 else ())
        self.bias_ids = _ints([token_id for token_id, _ in params.logit_bias])
        self.biases: npt.NDArray[np.float32] = np.asarray(
            [bias for _, bias in params.logit_bias], dtype=np.float32
        )
        self._bad = _ints(params.bad_token_ids)
        allowed = _ints(params.allowed_token_ids)
        self._allowed = allowed[~np.isin(allowed, self._bad)]
        self._ends = _ints([*eos_token_ids, *params.stop_token_ids]) if params.min_tokens else _NONE
        self._bad_after: dict[int, list[tuple[tuple[int, ...], int]]] = {}
        """By the token before the forbidden one: all tokens before it, and itself."""
        for *before, last in params.bad_token_sequences:
            self._bad_after.setdefault(before[-1], []).append((tuple(before), last))

    def fits(self, row: SampleRow) -> bool:
        """Whether this state is of ``row``'s sequence, at this point of it or before."""
        return (
            self._params is row.params
            and self._prompt_ids is row.prompt_ids
            and self._num_counted <= len(row.output_ids)
        )

    def count(self, output_ids: Sequence[int]) -> None:
        """Take in what is new; calling it again with the same output changes nothing."""
        if self.seen is not None and self._num_counted < len(output_ids):
            self.seen.add(output_ids[self._num_counted :])
            self._num_counted = len(output_ids)

    def masked(self, output_ids: Sequence[int], vocab_size: int) -> tuple[Ints | None, Ints]:
        """(allowed ids, or None for all; forbidden ids) for the token behind ``output_ids``.

        Some token is always left. Where nothing would be, bad sequences are lifted first,
        then min_tokens: a request must not be able to make a step impossible.
        """
        ends = self._ends if len(output_ids) < self._params.min_tokens else _NONE
        behind = self._bad_behind(output_ids)
        if len(self._allowed):
            return self._allowed_but(ends, behind), _NONE
        for more in ((ends, behind), (ends,)):
            bad = np.concatenate([self._bad, *more])
            if len(bad) < vocab_size or len(np.unique(bad)) < vocab_size:
                return None, bad
        return None, self._bad

    def _allowed_but(self, ends: Ints, behind: Ints) -> Ints:
        """``allowed_token_ids`` without ``bad_token_ids`` are some: validated."""
        for bad in (np.concatenate([ends, behind]), ends):
            if len(bad):
                left = self._allowed[~np.isin(self._allowed, bad)]
                if len(left):
                    return left
        return self._allowed

    def _bad_behind(self, output_ids: Sequence[int]) -> Ints:
        if not self._bad_after or not output_ids:
            return _NONE
        return _ints(
            [
                last
                for before, last in self._bad_after.get(output_ids[-1], ())
                if tuple(output_ids[-len(before) :]) == before
            ]
        )


def _ints(values: Sequence[int]) -> Ints:
    return np.asarray(values, dtype=np.int64)
