"""100,000 draws against probabilities written down from the definitions, token by token."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from baton.engine.sampling.apply import apply_rules
from baton.engine.sampling.draw import draw_tokens
from baton.engine.sampling.rows import SampleRow
from baton.engine.sampling.rules import SequenceRules
from baton.protocol.sampling import SamplingParams

NUM_DRAWS = 100_000
DRAWS_PER_CALL = 20_000
VOCAB = 40
EOS = 3
PROMPT = (5, 9, 9, 21, 30)
OUTPUT = (9, 14, 14, 14, 2, 7)
"""20 and 7 can end a bad sequence here: the output ends in 2, 7."""

SETTINGS = [
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.6, seed=2),
    SamplingParams(temperature=1.3, top_k=7, seed=3),
    SamplingParams(temperature=0.9, top_p=0.8, seed=4),
    SamplingParams(temperature=1.1, top_k=12, top_p=0.7, seed=5),
    SamplingParams(temperature=1.0, top_k=1_000, top_p=0.95, seed=2**63 - 1),
    SamplingParams(temperature=1.2, min_p=0.1, seed=6),
    SamplingParams(temperature=1.5, min_p=0.05, top_p=0.8, seed=7),
    SamplingParams(temperature=1.5, min_p=0.03, top_k=9, top_p=0.9, seed=8),
    SamplingParams(temperature=1.0, repetition_penalty=1.7, seed=9),
    SamplingParams(temperature=1.0, repetition_penalty=0.6, top_p=0.9, seed=10),
    SamplingParams(temperature=0.8, presence_penalty=1.5, frequency_penalty=0.7, seed=11),
    SamplingParams(temperature=1.0, presence_penalty=-1.0, frequency_penalty=-0.4, seed=12),
    SamplingParams(
        temperature=1.0,
        repetition_penalty=1.2,
        presence_penalty=1.0,
        frequency_penalty=0.3,
        seed=16,
    ),
    SamplingParams(temperature=1.0, logit_bias=((4, 3.0), (11, -2.0), (30, -100.0)), seed=13),
    SamplingParams(
        temperature=1.4,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.2,
        logit_bias=((9, 1.0), (20, 4.0)),
        min_p=0.02,
        top_k=25,
        top_p=0.95,
        seed=14,
    ),
    SamplingParams(
        temperature=2.0,
        allowed_token_ids=(1, 2, 3, 4, 5, 20, 22, 33),
        bad_token_ids=(4, 5),
        bad_token_sequences=((2, 7, 20), (14, 22), (7, 33), (8, 7, 1)),
        min_tokens=7,
        stop_token_ids=(22,),
        seed=15,
    ),
]


def example_logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)) * 2


def is_banned(token: int, p: SamplingParams) -> bool:
    if p.allowed_token_ids and token not in p.allowed_token_ids:
        return True
    if len(OUTPUT) < p.min_tokens and token in (EOS, *p.stop_token_ids):
        return True
    for *before, last in p.bad_token_sequences:
        if token == last and list(OUTPUT[-len(before) :]) == before:
            return True
    return token in p.bad_token_ids


def ruled_logit(token: int, logit: float, p: SamplingParams) -> float:
    logit += dict(p.logit_bias).get(token, 0.0)
    if token in PROMPT or token in OUTPUT:
        logit = logit / p.repetition_penalty if logit > 0 else logit * p.repetition_penalty
    count = Counter(OUTPUT)[token]
    return logit - p.frequency_penalty * count - p.presence_penalty * (count > 0)


def expected_probabilities(logits: list[float], p: SamplingParams) -> np.ndarray:
    ruled = {i: ruled_logit(i, x, p) for i, x in enumerate(logits) if not is_banned(i, p)}
    order = sorted(ruled, key=lambda i: (-ruled[i], i))
    weights = {i: math.exp((ruled[i] - ruled[order[0]]) / p.temperature) for i in order}
    order = [i for i in order if weights[i] >= p.min_p]
    order = order[: p.top_k or len(order)]
    total = sum(weights[i] for i in order)
    kept: list[int] = []
    mass = 0.0
    for i in order:
        kept.append(i)
        mass += weights[i] / total
        if mass >= p.top_p:
            break
    probabilities = np.zeros(len(logits))
    for i in kept:
        probabilities[i] = weights[i]
    total_weight: float = probabilities.sum()
    return probabilities / total_weight


@pytest.mark.parametrize("params", SETTINGS, ids=lambda p: str(p.seed))
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    logits = example_logits()
    probabilities = expected_probabilities(logits.tolist(), params)
    rules = SequenceRules(SampleRow("s", params, 0, PROMPT, OUTPUT), (EOS,))
    rules.count(OUTPUT)
    ruled = logits[None].clone()
    apply_rules(ruled, [(0, params, OUTPUT, rules)])
    counts = np.zeros(VOCAB)
    for first in range(0, NUM_DRAWS, DRAWS_PER_CALL):
        positions = range(first, first + DRAWS_PER_CALL)
        rows = ruled.expand(DRAWS_PER_CALL, -1)
        drawn = draw_tokens(rows, [params] * DRAWS_PER_CALL, positions)
        counts += np.bincount(drawn.numpy(), minlength=VOCAB)
    kept = probabilities > 0
    assert counts[~kept].sum() == 0
    expected = probabilities[kept] * NUM_DRAWS
    chi_square = ((counts[kept] - expected) ** 2 / expected).sum()
    freedom = kept.sum() - 1
    # Mean and spread of chi-square; beyond five sigma a right sampler falls for one key in 10^5.
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 5


def test_the_settings_make_a_difference() -> None:
    """Each keeps or weighs tokens otherwise than all others do: none could be ignored."""
    tables = [expected_probabilities(example_logits().tolist(), p) for p in SETTINGS]
    for n, table in enumerate(tables):
        assert all(abs(table - other).sum() > 1e-3 for other in tables[:n])
