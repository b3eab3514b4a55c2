import math

import pytest
import torch

from baton.checkpoint.rope_fields import RopeSpec
from baton.engine.rope import Rotary, inverse_frequencies, rotate, rotation

CPU = torch.device("cpu")
POSITIONS = torch.arange(600)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def angles(rope: RopeSpec, positions: torch.Tensor, head_dim: int = 32) -> torch.Tensor:
    turn = rotation(rope, inverse_frequencies(rope, head_dim, CPU), positions)
    return torch.atan2(turn.sin, turn.cos)


def test_scores_depend_on_the_distance_alone() -> None:
    rope = RopeSpec()
    q, k = torch.randn(2, 32).double().unbind()

    def score(at: int, seen: int) -> float:
        positions = torch.tensor([at, seen])
        turn = rotation(rope, inverse_frequencies(rope, 32, CPU), positions)
        heads = torch.stack((q, k))[:, None]
        turned = rotate(heads, turn)[:, 0]
        return float(turned[0] @ turned[1])

    assert math.isclose(score(7, 3), score(504, 500), rel_tol=1e-4)
    assert not math.isclose(score(7, 3), score(504, 499), rel_tol=1e-2)


def test_a_partial_rotation_leaves_the_rest() -> None:
    heads = torch.randn(4, 3, 32)
    rope = RopeSpec(rotary_dim=8)
    turn = rotation(rope, inverse_frequencies(rope, 32, CPU), torch.arange(1, 5))
    turned = rotate(heads, turn)
    assert torch.equal(turned[..., 8:], heads[..., 8:])
    assert not torch.isclose(turned[..., 0], heads[..., 0]).any()
    torch.testing.assert_close(turned[..., :8].norm(dim=-1), heads[..., :8].norm(dim=-1))


def test_dynamic_angles_depend_on_the_position_alone() -> None:
    rope = RopeSpec("dynamic", factor=4.0, original_max_positions=128)
    whole = angles(rope, POSITIONS)
    assert torch.equal(whole[:128], angles(RopeSpec(), POSITIONS[:128]))
    assert torch.equal(whole[300:301], angles(rope, POSITIONS[300:301]))
    slow = inverse_frequencies(rope, 32, CPU)[-1]
    assert bool((whole[128:, -1] < POSITIONS[128:] * slow).all())


def test_yarn_keeps_short_wavelengths_and_divides_long_ones() -> None:
    rope = RopeSpec("yarn", factor=8.0, original_max_positions=128)
    plain = inverse_frequencies(RopeSpec(), 32, CPU)
    ratio = plain / inverse_frequencies(rope, 32, CPU)
    assert ratio[0] == 1.0
    torch.testing.assert_close(ratio[-3:], torch.full((3,), 8.0))
    assert bool((ratio.diff() >= 0).all())


def test_the_attention_factor_lengthens_queries_and_keys() -> None:
    heads = torch.randn(5, 2, 32)
    rope = RopeSpec("yarn", factor=8.0, original_max_positions=128, attention_factor=1.25)
    turn = rotation(rope, inverse_frequencies(rope, 32, CPU), torch.arange(5))
    torch.testing.assert_close(rotate(heads, turn).norm(dim=-1), 1.25 * heads.norm(dim=-1))


def test_layers_of_one_kind_share_their_angles() -> None:
    near, far = RopeSpec(theta=10_000.0), RopeSpec(theta=1_000_000.0)
    turns = Rotary((near, near, far, near), 32, CPU).rotations(POSITIONS)
    assert turns[0] is turns[1]
    assert turns[0] is turns[3]
    assert turns[2] is not turns[0]
    assert not torch.equal(turns[2].sin, turns[0].sin)
