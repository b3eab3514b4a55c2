"""The same rules and filters as transformers' own logits processors, on random logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from baton.engine.sampling import draw
from baton.engine.sampling.apply import apply_rules
from baton.engine.sampling.rows import SampleRow
from baton.engine.sampling.rules import SequenceRules
from baton.protocol.sampling import SamplingParams

VOCAB = 120
NUM_ROWS = 16
EOS = 7


def random_logits(seed: int, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(NUM_ROWS, VOCAB, generator=generator) * spread


def random_ids(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, VOCAB, length).tolist())


def ruled(
    logits: torch.Tensor, params: SamplingParams, prompt: tuple[int, ...], output: tuple[int, ...]
) -> torch.Tensor:
    """All rows under the same rules, as one batch."""
    rules = SequenceRules(SampleRow("s", params, 0, prompt, output), (EOS,))
    rules.count(output)
    logits = logits.clone()
    apply_rules(logits, [(i, params, output, rules) for i in range(len(logits))])
    return logits


def processed(
    processor: hf.LogitsProcessor, logits: torch.Tensor, ids: tuple[int, ...]
) -> torch.Tensor:
    scores: torch.Tensor = processor(torch.tensor([ids] * len(logits)), logits.clone())
    return scores


@pytest.mark.parametrize("penalty", [0.4, 1.1, 1.8])
def test_repetition_penalty(penalty: float) -> None:
    logits, prompt, output = random_logits(1), random_ids(1, 40), random_ids(2, 60)
    expected = processed(hf.RepetitionPenaltyLogitsProcessor(penalty), logits, prompt + output)
    found = ruled(logits, SamplingParams(repetition_penalty=penalty), prompt, output)
    assert torch.equal(found, expected)


def test_bad_words() -> None:
    """transformers looks into the prompt as well; here it has none."""
    output = random_ids(3, 50)
    singles = (4, 80)
    sequences = (
        (*output[-1:], 11),
        (*output[-3:], 12),
        (*output, 13),
        (*output[-2:], 14, 15),
        (*output[-3:-1], 16),
        (VOCAB - 1, 17) if output[-1] != VOCAB - 1 else (0, 17),
    )
    processor = hf.NoBadWordsLogitsProcessor([[i] for i in singles] + [[*s] for s in sequences])
    logits = random_logits(2)
    expected = processed(processor, logits, output)
    params = SamplingParams(bad_token_ids=singles, bad_token_sequences=sequences)
    found = ruled(logits, params, (), output)
    assert torch.equal(found, expected)
    assert sorted(torch.isinf(found[0]).nonzero()[:, 0].tolist()) == [4, 11, 12, 13, 80]


@pytest.mark.parametrize("num_output", [0, 4, 5, 6])
def test_min_tokens(num_output: int) -> None:
    prompt, output = random_ids(4, 10), random_ids(5, num_output)
    stops = (20, 21)
    processor = hf.MinNewTokensLengthLogitsProcessor(len(prompt), 5, [EOS, *stops], "cpu")
    logits = random_logits(3)
    expected = processed(processor, logits, prompt + output)
    params = SamplingParams(min_tokens=5, stop_token_ids=stops)
    assert torch.equal(ruled(logits, params, prompt, output), expected)
    assert torch.isinf(expected[0, EOS]) == (num_output < 5)


def test_logit_bias() -> None:
    bias = ((3, 2.5), (50, -7.0), (EOS, 100.0))
    processor = hf.SequenceBiasLogitsProcessor([[[i], value] for i, value in bias])
    logits = random_logits(4)
    expected = processed(processor, logits, (1, 2))
    assert torch.equal(ruled(logits, SamplingParams(logit_bias=bias), (1, 2), ()), expected)


def test_allowed_and_bad_tokens_suppress_the_others() -> None:
    allowed, bad = tuple(range(0, VOCAB, 3)), (0, 30, 31)
    others = [i for i in range(VOCAB) if i not in allowed or i in bad]
    logits = random_logits(5)
    expected = processed(hf.SuppressTokensLogitsProcessor(others), logits, (1,))
    params = SamplingParams(allowed_token_ids=allowed, bad_token_ids=bad)
    assert torch.equal(ruled(logits, params, (1,), ()), expected)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.4, top_k=1),
        SamplingParams(temperature=1.4, top_k=17),
        SamplingParams(temperature=0.8, top_p=0.9),
        SamplingParams(temperature=1.0, top_p=0.05),
        SamplingParams(temperature=2.0, min_p=0.02),
        SamplingParams(temperature=2.0, min_p=0.01, top_p=0.7),
        SamplingParams(temperature=1.5, min_p=0.03, top_k=20, top_p=0.95),
    ],
    ids=str,
)
def test_every_token_has_the_weight_it_has_there(
    params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processors in vLLM's order. A draw inverts the cumulative distribution in id order, so a
    number in the middle of a token's share must give that token, for each token that is kept."""
    processors: list[hf.LogitsProcessor] = [hf.TemperatureLogitsWarper(params.temperature)]
    if params.min_p:
        processors.append(hf.MinPLogitsWarper(params.min_p))
    if params.top_k:
        processors.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(hf.TopPLogitsWarper(params.top_p))
    logits = random_logits(6)
    scores = logits.clone()
    for processor in processors:
        scores = processor(torch.zeros(NUM_ROWS, 1), scores)
    probabilities = scores.double().softmax(dim=-1)
    rows, ids = (probabilities > 1e-6).nonzero(as_tuple=True)
    middles = (probabilities.cumsum(dim=-1) - probabilities / 2)[rows, ids]
    monkeypatch.setattr(draw, "uniforms", lambda seeds, positions: middles.numpy())
    found = draw.draw_tokens(logits[rows], [params] * len(rows), range(len(rows)))
    assert torch.equal(found, ids)
