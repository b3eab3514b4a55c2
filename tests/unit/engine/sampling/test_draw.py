import numpy as np
import pytest
import torch

from baton.engine.philox import uniforms
from baton.engine.sampling import draw
from baton.engine.sampling.draw import best_ids, draw_tokens
from baton.engine.sampling.logprobs import token_logprobs
from baton.protocol.sampling import SamplingParams


def test_a_draw_does_not_depend_on_its_batch() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(24, 700, generator=generator) * 3
    choices = [
        SamplingParams(temperature=t, top_k=k, top_p=p, seed=100 + n)
        for n, (t, k, p) in enumerate(
            (t, k, p) for t in (0.0, 0.7, 1.5) for k in (0, 5) for p in (1.0, 0.9, 0.3, 0.999)
        )
    ]
    positions = [7 * n for n in range(24)]
    together = draw_tokens(logits, choices, positions).tolist()
    alone = [draw_tokens(logits[n : n + 1], [choices[n]], [positions[n]]).item() for n in range(24)]
    order = np.random.default_rng(0).permutation(24)
    shuffled = draw_tokens(
        logits[torch.from_numpy(order)],
        [choices[n] for n in order],
        [positions[n] for n in order],
    )
    assert alone == together
    assert shuffled.tolist() == [together[n] for n in order]


def test_seed_and_position_key_the_draw() -> None:
    logits = torch.zeros(4, 1000)
    params = [SamplingParams(seed=s) for s in (1, 1, 1, 2)]
    drawn = draw_tokens(logits, params, [9, 9, 10, 9]).tolist()
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3
    assert drawn[0] == int(uniforms([1], [9])[0] * 1000)


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    greedy = SamplingParams(temperature=0.0, top_k=2, top_p=0.1)
    assert draw_tokens(logits, [greedy, greedy], [0, 1]).tolist() == [1, 0]


def test_ties_at_the_edge_of_top_k_go_to_the_lower_id() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0, 2.0]])
    assert best_ids(logits, 3).tolist() == [[0, 1, 4]]
    assert best_ids(logits, 9).tolist() == [[0, 1, 2, 3, 4]]
    params = SamplingParams(temperature=1.0, top_k=3)
    drawn = {draw_tokens(logits, [params], [n]).item() for n in range(200)}
    assert drawn == {0, 1, 4}


@pytest.mark.parametrize("top_p", [1e-9, 0.5])
def test_top_p_keeps_at_least_the_best(top_p: float) -> None:
    logits = torch.tensor([[0.0, 5.0, 0.0]])
    params = SamplingParams(temperature=1.0, top_p=top_p)
    assert {draw_tokens(logits, [params], [n]).item() for n in range(50)} == {1}


def test_top_p_stops_where_the_mass_is_reached_exactly() -> None:
    logits = torch.log(torch.tensor([[0.125, 0.5, 0.125, 0.25]]))
    params = SamplingParams(temperature=1.0, top_p=0.74)
    assert {draw_tokens(logits, [params], [n]).item() for n in range(100)} == {1, 3}


def test_top_p_keeps_no_more_than_it_needs() -> None:
    params = SamplingParams(temperature=1.0, top_p=0.5)
    drawn = {draw_tokens(torch.zeros(1, 4), [params], [n]).item() for n in range(100)}
    assert drawn == {0, 1}


def test_the_ends_of_the_interval_draw_kept_tokens_only() -> None:
    weights = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]], dtype=torch.float64).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert draw._invert(weights, ends).tolist() == [[1], [3]]


@pytest.mark.parametrize("temperature", [1e-320, 1e-6, 100.0])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = torch.tensor([[-50.0, 30.0, 29.0, 80.0]])
    params = SamplingParams(temperature=temperature, top_p=0.9)
    drawn = {draw_tokens(logits, [params], [n]).item() for n in range(100)}
    assert drawn <= {0, 1, 2, 3}
    if temperature < 1:
        assert drawn == {3}


def test_few_candidates_first_gives_the_same_nucleus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat rows need the whole vocabulary, steep ones do not; mixed, none may notice."""
    steepness = torch.tensor([0.0, 0.01, 1.0, 8.0, 0.3, 20.0])[:, None]
    logits = torch.randn(6, 3_000, generator=torch.Generator().manual_seed(1)) * steepness
    params = [SamplingParams(temperature=1.0, top_p=0.97, seed=n) for n in range(6)]
    found = [draw_tokens(logits, params, [p] * 6).tolist() for p in range(40)]
    monkeypatch.setattr(draw, "NUCLEUS_CANDIDATES", 3_000)
    assert found == [draw_tokens(logits, params, [p] * 6).tolist() for p in range(40)]


def test_logprobs_list_the_best_first_and_ties_by_id() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [9.0, 1.0, 1.0, 1.0]])
    reference = logits.log_softmax(dim=-1)
    found = token_logprobs(reference, torch.tensor([1, 2]), [3, 0])
    assert found[0].logprob == pytest.approx(reference[0, 1].item())
    assert [t.token_id for t in found[0].top] == [1, 3, 2]
    assert [t.logprob for t in found[0].top] == pytest.approx(reference[0, [1, 3, 2]].tolist())
    assert found[1].logprob == pytest.approx(reference[1, 2].item())
    assert found[1].top == ()
