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


@pytest.mark.parametrize("size", [5, 128, 129, 300, 1024])
def test_the_ends_of_the_interval_draw_kept_tokens_only(size: int) -> None:
    weights = torch.zeros(2, size)
    first, last = size // 3, 2 * size // 3
    weights[:, first], weights[:, last] = 0.3, 0.7
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert draw.invert(weights, ends).tolist() == [first, last]
    weights[:, size - 1] = 0.1
    assert draw.invert(weights, ends).tolist() == [first, size - 1]


def test_the_end_of_a_block_draws_its_last_token_and_no_other() -> None:
    """Block sums and running sums round apart; between them nothing else may be drawn."""
    generator = torch.Generator().manual_seed(2)
    weights = (torch.rand(4_000, 512, generator=generator) * -40).exp()
    weights.view(4_000, 4, 128)[:, :, 100:] = 0
    ends = weights.view(4_000, 4, 128).sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    below = (ends[:, 1] / ends[:, 3]).nextafter(torch.zeros(4_000, dtype=torch.float64))
    drawn = draw.invert(weights, below)
    assert (weights.gather(1, drawn[:, None]) > 0).all()
    assert ((drawn >= 128) & (drawn < 356)).all()


@pytest.mark.parametrize("size", [1, 40, 128, 1000, 4096])
def test_a_draw_inverts_the_running_sum(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    weights = torch.rand(200, size, generator=generator) ** 6
    weights[weights < 0.01] = 0
    weights[:, size // 2] = 1e-3
    uniform = torch.rand(200, generator=generator, dtype=torch.float64)
    sums = weights.double().cumsum(dim=1)
    expected = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)[:, 0]
    assert torch.equal(draw.invert(weights, uniform), expected)


@pytest.mark.parametrize("temperature", [1e-320, 1e-6, 100.0])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = torch.tensor([[-50.0, 30.0, 29.0, 80.0]])
    params = SamplingParams(temperature=temperature, top_p=0.9)
    drawn = {draw_tokens(logits, [params], [n]).item() for n in range(100)}
    assert drawn <= {0, 1, 2, 3}
    if temperature < 1:
        assert drawn == {3}


def kept_by_sorting(logits: torch.Tensor, p: SamplingParams) -> torch.Tensor:
    scaled = (logits - logits.max()) / p.temperature
    ranked, order = scaled.sort(descending=True, stable=True)
    weights = ranked.exp().double()
    weights[p.top_k or len(weights) :] = 0
    before = weights.cumsum(dim=0) - weights
    weights[before >= p.top_p * weights.sum()] = 0
    return torch.zeros(len(logits), dtype=torch.float64).scatter(0, order, weights)


@pytest.mark.parametrize("top_k", [0, 1, 40, 2_999])
@pytest.mark.parametrize("top_p", [0.0001, 0.5, 0.97, 0.999999, 1.0])
def test_filters_keep_what_sorting_keeps(top_k: int, top_p: float) -> None:
    """Flat rows and steep ones, rows of equal values, rows that are mostly masked."""
    steepness = torch.tensor([0.0, 1e-4, 0.01, 1.0, 8.0, 0.3, 20.0, 1.0, 1.0])[:, None]
    logits = torch.randn(9, 3_000, generator=torch.Generator().manual_seed(1)) * steepness
    logits[7] = logits[7].round()
    logits[8, 20:] = float("-inf")
    params = [SamplingParams(temperature=0.9, top_k=top_k, top_p=top_p)] * 9
    for rows in (range(9), [4], [8, 0]):
        ours = params[: len(rows)]
        scaled = draw._scaled(logits[list(rows)], ours, range(len(rows)))
        found = draw._weights(scaled, ours)
        for n, row in enumerate(rows):
            expected = kept_by_sorting(logits[row], params[row])
            assert torch.equal(found[n] > 0, expected > 0)
            assert torch.allclose(found[n].double(), expected)


def test_logprobs_list_the_best_first_and_ties_by_id() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [9.0, 1.0, 1.0, 1.0]])
    reference = logits.log_softmax(dim=-1)
    found = token_logprobs(reference, torch.tensor([1, 2]), [3, 0])
    assert found[0].logprob == pytest.approx(reference[0, 1].item())
    assert [t.token_id for t in found[0].top] == [1, 3, 2]
    assert [t.logprob for t in found[0].top] == pytest.approx(reference[0, [1, 3, 2]].tolist())
    assert found[1].logprob == pytest.approx(reference[1, 2].item())
    assert found[1].top == ()
