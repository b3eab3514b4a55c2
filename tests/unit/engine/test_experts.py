from functools import partial

import pytest
import torch
from torch.nn.functional import silu

from baton.engine.models.experts import choose, mix_experts
from baton.engine.models.parameters import Experts

HIDDEN, INNER = 24, 10


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def experts(num_experts: int = 5, num_chosen: int = 2, *, normalized: bool = True) -> Experts:
    torch.manual_seed(1)
    return Experts(
        router=torch.randn(num_experts, HIDDEN),
        gate_up=torch.randn(num_experts, 2 * INNER, HIDDEN),
        down=torch.randn(num_experts, HIDDEN, INNER),
        num_chosen=num_chosen,
        normalized=normalized,
    )


def gated(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def one_by_one(row: torch.Tensor, e: Experts) -> torch.Tensor:
    probabilities = (e.router @ row).softmax(dim=0)
    best = probabilities.sort(descending=True).indices[: e.num_chosen].tolist()
    total = sum(probabilities[n] for n in best) if e.normalized else 1.0
    out = torch.zeros(HIDDEN)
    for n in best:
        out += probabilities[n] / total * (e.down[n] @ gated(e.gate_up[n] @ row))
    return out


def test_rows_get_what_their_own_experts_give() -> None:
    rows = torch.randn(37, HIDDEN, generator=torch.Generator().manual_seed(2))
    for e in (experts(), experts(normalized=False), experts(3, 3), experts(1, 1)):
        expected = torch.stack([one_by_one(row, e) for row in rows])
        torch.testing.assert_close(mix_experts(rows, e, gated), expected, rtol=1e-4, atol=1e-4)


def test_neighbours_do_not_change_a_row() -> None:
    e = experts()
    rows = torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(3))
    together = mix_experts(rows, e, gated)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(4))
    close(mix_experts(rows[order], e, gated), together[order])
    for n in (0, 13, 63):
        close(mix_experts(rows[n : n + 1], e, gated)[0], together[n])


def test_all_rows_may_want_the_same_expert() -> None:
    e = experts()
    row = torch.randn(1, HIDDEN)
    out = mix_experts(row.expand(9, -1), e, gated)
    torch.testing.assert_close(out, one_by_one(row[0], e).expand(9, -1), rtol=1e-4, atol=1e-4)


def test_choices_fall_in_probability_and_weights_sum_to_one() -> None:
    rows = torch.randn(20, HIDDEN)
    weights, chosen = choose(rows, experts())
    assert bool((weights[:, 0] >= weights[:, 1]).all())
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(20))
    assert bool((chosen[:, 0] != chosen[:, 1]).all())
    raw, same = choose(rows, experts(normalized=False))
    assert torch.equal(same, chosen)
    assert bool((raw.sum(dim=-1) < 1).all())
