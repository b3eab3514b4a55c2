from __future__ import annotations

import pytest

from baton.client import Choice, Token, TokenLogprobs, TopLogprob
from benchmarks.gate import GateFailed, compare
from benchmarks.workload import Gate

GATE = Gate(near_tie_logprob=1e-3)
NAMES = ("A", "B")


def choice(*token_ids: int, gap: float = 1.0) -> Choice:
    """Beside each token stands its rival, the next id, ``gap`` nats behind."""
    tokens = tuple(
        Token(
            i, "", TokenLogprobs(-0.5, (TopLogprob(i, -0.5, ""), TopLogprob(i + 1, -0.5 - gap, "")))
        )
        for i in token_ids
    )
    return Choice(index=0, text="", tokens=tokens, finish_reason="length")


def test_equal_tokens_pass() -> None:
    found = compare(NAMES, [choice(1, 2), choice(3, 4)], [choice(1, 2), choice(3, 4)], GATE)
    assert (found.num_prompts, found.num_tokens, found.num_near_ties) == (2, 4, 0)


def test_a_near_tie_is_counted() -> None:
    found = compare(NAMES, [choice(1, 2, 3, gap=1e-5)], [choice(1, 3, 9)], GATE)
    assert found.num_near_ties == 1


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (choice(1, 2), choice(1, 3), "prompt 0 of 1, output token 1: A has 2, B has 3"),
        (choice(1, 2, gap=1e-5), choice(1, 7), "output token 1"),
        (choice(1, 2), choice(1), "A has 2, B has no token"),
        (choice(1), choice(1, 2), "A has no token, B has 2"),
    ],
)
def test_a_difference_is_named(one: Choice, other: Choice, said: str) -> None:
    with pytest.raises(GateFailed) as caught:
        compare(NAMES, [one], [other], GATE)
    assert said in caught.value.message
