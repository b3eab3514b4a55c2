"""What the sampler keeps between steps must never show in what it draws."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine import sampler as sampler_module
from baton.engine.sampler import Sampler
from baton.engine.sampling.rows import SampleRow
from baton.engine.sampling.seen_tokens import SeenTokens
from baton.protocol.sampling import SamplingParams

VOCAB = 30
PROMPT = (1, 7, 7)
EOS = (2, 5)
PENALISED = SamplingParams(
    temperature=1.5,
    repetition_penalty=1.4,
    presence_penalty=0.5,
    frequency_penalty=0.3,
    logit_bias=((4, 2.0), (9, -3.0)),
    bad_token_ids=(11,),
    bad_token_sequences=((4, 4), (1, 7, 3), (7, 8)),
    min_tokens=6,
    stop_token_ids=(12,),
    seed=77,
)
WHITELISTED = SamplingParams(allowed_token_ids=(2, 3, 4, 5), min_tokens=9, seed=3)
PLAIN = SamplingParams(seed=5)


def row(
    params: SamplingParams,
    prompt: tuple[int, ...] = (1, 7, 7),
    output: tuple[int, ...] | list[int] = (),
    seq_id: str = "s",
) -> SampleRow:
    return SampleRow(seq_id, params, len(prompt) + len(output), prompt, output)


def logits_of(step: int, num_rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(num_rows, VOCAB, generator=generator) * 2


def generate(params: SamplingParams, num_tokens: int, sampler: Sampler | None) -> list[int]:
    """One sequence, step by step; a fresh sampler for every step when None is given."""
    prompt: tuple[int, ...] = (1, 7, 7)
    output: list[int] = []
    for step in range(num_tokens):
        one = sampler or Sampler(EOS)
        (drawn,) = one.sample(logits_of(step), [row(params, prompt, output)])
        output.append(drawn.token_id)
    return output


@pytest.mark.parametrize("params", [PENALISED, WHITELISTED, PLAIN])
def test_kept_state_draws_what_rebuilt_state_draws(params: SamplingParams) -> None:
    assert generate(params, 60, Sampler(EOS)) == generate(params, 60, None)


def test_a_continuation_elsewhere_draws_the_same() -> None:
    """Another worker has prompt and output, and nothing else."""
    whole = generate(PENALISED, 40, Sampler(EOS))
    for cut in (0, 1, 5, 6, 39):
        there, output = Sampler(EOS), whole[:cut]
        for step in range(cut, 40):
            (drawn,) = there.sample(logits_of(step), [row(PENALISED, output=output)])
            output.append(drawn.token_id)
        assert output == whole


def test_the_same_step_twice_counts_once() -> None:
    sampler, output = Sampler(EOS), [4, 4, 6]
    calls = [sampler.sample(logits_of(9), [row(PENALISED, output=output)]) for _ in range(3)]
    assert calls[0] == calls[1] == calls[2]
    assert calls[0] == Sampler(EOS).sample(logits_of(9), [row(PENALISED, output=output)])


def test_a_row_does_not_notice_its_batch() -> None:
    rng = np.random.default_rng(4)
    choices = [PENALISED, WHITELISTED, PLAIN, replace_params(PENALISED, temperature=0.0)]
    rows = [
        row(
            replace_params(choices[n % 4], seed=n, num_logprobs=n % 3),
            tuple(rng.integers(0, VOCAB, n).tolist()),
            tuple(rng.integers(0, VOCAB, 2 * n).tolist()),
            f"s{n}",
        )
        for n in range(20)
    ]
    logits = logits_of(1, 20)
    together = Sampler(EOS).sample(logits.clone(), rows)
    alone = [Sampler(EOS).sample(logits[n : n + 1].clone(), [rows[n]])[0] for n in range(20)]
    assert [t.token_id for t in together] == [t.token_id for t in alone]
    for one, other in zip(together, alone, strict=True):
        assert (one.logprobs is None) == (other.logprobs is None)


def replace_params(params: SamplingParams, **changes: object) -> SamplingParams:
    return SamplingParams(**{f: getattr(params, f) for f in params.__struct_fields__} | changes)


def test_log_probabilities_are_of_the_plain_distribution() -> None:
    logits = logits_of(3)
    reference = logits.log_softmax(dim=-1)[0]
    params = replace_params(PENALISED, num_logprobs=VOCAB, temperature=0.1, top_k=1)
    (drawn,) = Sampler(EOS).sample(logits.clone(), [row(params)])
    assert drawn.logprobs is not None
    assert drawn.logprobs.logprob == pytest.approx(reference[drawn.token_id].item())
    found = {best.token_id: best.logprob for best in drawn.logprobs.top}
    assert found == pytest.approx(dict(enumerate(reference.tolist())))


def test_rows_without_rules_are_not_kept_and_not_touched() -> None:
    sampler, logits = Sampler(EOS), logits_of(1, 2)
    before = logits.clone()
    sampler.sample(logits, [row(PLAIN), row(PENALISED, seq_id="t")])
    assert torch.equal(logits[0], before[0])
    assert not torch.equal(logits[1], before[1])
    assert sampler.num_kept == 1
    sampler.forget(["t", "unknown"])
    assert sampler.num_kept == 0


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "MAX_KEPT_SEQUENCES", 3)
    sampler = Sampler(EOS)
    rows = [row(PENALISED, output=(4, n), seq_id=f"s{n}") for n in range(5)]
    fresh = [Sampler(EOS).sample(logits_of(n), [r])[0].token_id for n, r in enumerate(rows)]
    for _ in range(2):
        for n, r in enumerate(rows):
            assert sampler.sample(logits_of(n), [r])[0].token_id == fresh[n]
            assert sampler.num_kept <= 3
    together = sampler.sample(torch.cat([logits_of(n) for n in range(5)]), rows)
    assert [t.token_id for t in together] == fresh


def test_an_id_that_is_used_again_starts_anew() -> None:
    sampler = Sampler(EOS)
    sampler.sample(logits_of(0), [row(PENALISED, output=(4, 4, 4, 4))])
    other = row(PENALISED, prompt=(8, 9), output=(6, 6, 6, 6, 6))
    assert sampler.sample(logits_of(1), [other]) == Sampler(EOS).sample(logits_of(1), [other])


def test_a_sequence_that_is_shorter_than_before_starts_anew() -> None:
    """As after a step that was undone: the same prompt and parameters, another output."""
    sampler = Sampler(EOS)
    for output in ((4, 4, 4, 4), (6,), (6, 6)):
        one = row(PENALISED, prompt=PROMPT, output=output)
        assert sampler.sample(logits_of(1), [one]) == Sampler(EOS).sample(logits_of(1), [one])
    kept = sampler._kept["s"].seen
    assert kept is not None
    assert dict(zip(kept.ids.tolist(), kept.counts.tolist(), strict=True)) == {1: 0, 7: 0, 6: 2}


def test_a_request_always_has_a_token_to_draw() -> None:
    """Bad sequences are lifted first, then min_tokens; allowed and bad tokens hold always."""
    ends_only = SamplingParams(allowed_token_ids=(2, 12), stop_token_ids=(12,), min_tokens=5)
    drawn = {draw_one(ends_only, (), seed) for seed in range(30)}
    assert drawn == {2, 12}
    sequences = SamplingParams(
        allowed_token_ids=(2, 6, 7), min_tokens=5, bad_token_sequences=((6, 6), (6, 7))
    )
    assert {draw_one(sequences, (6,), seed) for seed in range(30)} == {6, 7}
    everything = SamplingParams(
        bad_token_ids=tuple(i for i in range(VOCAB) if i not in (2, 8)),
        bad_token_sequences=((8, 8),),
        min_tokens=9,
    )
    assert {draw_one(everything, (8,), seed) for seed in range(30)} == {8}


def draw_one(params: SamplingParams, output: tuple[int, ...], seed: int) -> int:
    params = replace_params(params, seed=seed)
    return Sampler(EOS).sample(logits_of(2), [row(params, output=output)])[0].token_id


def test_greedy_obeys_the_rules_too() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 11], logits[0, 2], logits[0, 6] = 9.0, 8.0, 7.0
    params = replace_params(PENALISED, temperature=0.0)
    assert Sampler(EOS).sample(logits.clone(), [row(params)])[0].token_id == 6
    late = row(params, output=(0,) * 6)
    assert Sampler(EOS).sample(logits.clone(), [late])[0].token_id == 2


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 200), max_size=150),
    outputs=st.lists(st.lists(st.integers(0, 200), max_size=90), max_size=6),
)
def test_seen_tokens_count_what_was_seen(prompt: list[int], outputs: list[list[int]]) -> None:
    seen = SeenTokens(prompt)
    for part in outputs:
        seen.add(part)
    output = list(itertools.chain(*outputs))
    expected = dict.fromkeys(prompt, 0) | Counter(output)
    assert dict(zip(seen.ids.tolist(), seen.counts.tolist(), strict=True)) == expected
