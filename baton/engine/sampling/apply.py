"""Applies the rules of many rows to their logits, in place and for all rows at once.

vLLM's order, with the same outcome: masks are -inf, which no bias and no penalty lifts, so
here they come last.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.engine.sampling.rules import SequenceRules
from baton.engine.sampling.seen_tokens import Ints, SeenTokens
from baton.protocol.sampling import SamplingParams

Ruled = tuple[int, SamplingParams, Sequence[int], SequenceRules]
"""Row of the logits, and what holds there: parameters, output so far, state."""


def apply_rules(logits: Tensor, ruled: Sequence[Ruled]) -> None:
    """logits: ``[S, V]`` float32, contiguous; changed in place. A row occurs once."""
    _bias(logits, [(row, rules) for row, _, _, rules in ruled if len(rules.bias_ids)])
    _penalise(logits, [(row, params, rules.seen) for row, params, _, rules in ruled if rules.seen])
    _mask(logits, ruled)


def _bias(logits: Tensor, ruled: Sequence[tuple[int, SequenceRules]]) -> None:
    if ruled:
        places = _places(logits, [(row, rules.bias_ids) for row, rules in ruled])
        logits.view(-1)[places] += _tensor(logits, [rules.biases for _, rules in ruled])


def _penalise(logits: Tensor, seen: Sequence[tuple[int, SamplingParams, SeenTokens]]) -> None:
    """Repetition scales towards less likely; frequency times count, and presence, go off."""
    if not seen:
        return
    places = _places(logits, [(row, tokens.ids) for row, _, tokens in seen])
    counts = _tensor(logits, [tokens.counts for _, _, tokens in seen])
    lengths = [len(tokens.ids) for _, _, tokens in seen]

    def spread(values: list[float]) -> Tensor:
        return _tensor(logits, [np.repeat(np.asarray(values, dtype=np.float32), lengths)])

    repetition = spread([params.repetition_penalty for _, params, _ in seen])
    flat = logits.view(-1)
    values = flat[places]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= spread([params.frequency_penalty for _, params, _ in seen]) * counts
    values -= spread([params.presence_penalty for _, params, _ in seen]) * (counts > 0)
    flat[places] = values


def _mask(logits: Tensor, ruled: Sequence[Ruled]) -> None:
    kept: list[tuple[int, Ints]] = []
    dropped: list[tuple[int, Ints]] = []
    for row, _, output_ids, rules in ruled:
        allowed, forbidden = rules.masked(output_ids, logits.shape[1])
        if allowed is not None:
            kept.append((row, allowed))
        if len(forbidden):
            dropped.append((row, forbidden))
    flat = logits.view(-1)
    if kept:
        places = _places(logits, kept)
        values = flat[places]
        logits[[row for row, _ in kept]] = float("-inf")
        flat[places] = values
    if dropped:
        flat[_places(logits, dropped)] = float("-inf")


def _places(logits: Tensor, ids_of_rows: Sequence[tuple[int, Ints]]) -> Tensor:
    """Indices into the flattened logits: int64 ``[N]``."""
    vocab_size = logits.shape[1]
    return _tensor(logits, [row * vocab_size + ids for row, ids in ids_of_rows])


def _tensor(
    logits: Tensor, parts: Sequence[npt.NDArray[np.int64] | npt.NDArray[np.float32]]
) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(logits.device)
