"""What the lookups of many sequences take of memory and of a step."""

from __future__ import annotations

import pytest

from baton.engine import lookups
from baton.engine.lookups import MIN_TOKENS_PER_STEP, Lookups
from baton.engine.prompt_lookup import PromptLookup
from baton.engine.sequence import Sequence
from baton.protocol.sampling import SamplingParams


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "MAX_TOKENS_EACH", 100)
    monkeypatch.setattr(lookups, "MAX_TOKENS_IN_ALL", 250)
    monkeypatch.setattr(lookups, "MAX_TOKENS_PER_STEP", 40)


def sequence(name: str, num_tokens: int) -> Sequence:
    return Sequence(name, tuple(range(num_tokens)), [], SamplingParams())


def steps(of_all: Lookups, *sequences: Sequence, count: int = 9) -> list[PromptLookup | None]:
    """So many steps in which nothing is drawn; what the last one gives."""
    found: list[PromptLookup | None] = []
    for _ in range(count):
        of_all.begin_step()
        found = [of_all.up_to_date(s) for s in sequences]
        assert of_all.num_tokens <= 250
    return found


def test_a_long_prompt_is_taken_in_over_several_steps() -> None:
    of_all, long = Lookups(), sequence("long", 90)
    assert steps(of_all, long, count=2) == [None]
    assert of_all.num_tokens == 80
    [lookup] = steps(of_all, long, count=1)
    assert lookup is not None
    assert (len(lookup), lookup.num_seen) == (90, 90)


def test_what_one_takes_in_is_not_left_for_the_next() -> None:
    of_all = Lookups()
    both = [sequence("first", 90), sequence("second", 90)]
    assert steps(of_all, *both, count=1) == [None, None]
    assert of_all.num_tokens == 40 + MIN_TOKENS_PER_STEP


def test_whoever_is_nearly_there_need_not_wait_for_others() -> None:
    of_all, long, short = Lookups(), sequence("long", 90), sequence("short", 10)
    assert [f is not None for f in steps(of_all, long, short, count=1)] == [False, True]
    assert of_all.num_tokens == 40 + 10
    short.output_ids += range(MIN_TOKENS_PER_STEP)
    assert [f is not None for f in steps(of_all, long, short, count=1)] == [False, True]


def test_only_the_end_of_a_longer_one_is_looked_at_and_it_slides() -> None:
    of_all, longer = Lookups(), sequence("longer", 1_000)
    [lookup] = steps(of_all, longer)
    assert lookup is not None
    assert (len(lookup), lookup.num_seen) == (100, 1_000)
    longer.output_ids += [900, 901, 902]
    assert steps(of_all, longer, count=1) == [lookup]
    assert (len(lookup), lookup.propose(2)) == (100, [])
    longer.output_ids += [903, 904, 905, 950, 951, 952]
    steps(of_all, longer, count=1)
    assert lookup.propose(2) == [953, 954]


def test_who_comes_too_late_has_none_until_another_leaves() -> None:
    of_all = Lookups()
    first, second, late = (sequence(name, 100) for name in ("first", "second", "late"))
    assert [f is not None for f in steps(of_all, first, second, late)] == [True, True, False]
    assert len(of_all) == 2
    of_all.forget("first")
    of_all.forget("first")
    assert [f is not None for f in steps(of_all, second, late)] == [True, True]
    assert of_all.num_tokens == 200


def test_at_the_end_of_memory_each_gives_its_own_oldest() -> None:
    of_all = Lookups()
    growing = [sequence(name, 60) for name in "abcd"]
    assert all(steps(of_all, *growing))
    for number in range(60):
        for s in growing:
            s.output_ids.append(number)
        assert all(steps(of_all, *growing, count=1))
    assert of_all.num_tokens == 250
    of_all.forget("a")
    growing[1].output_ids.append(1)
    steps(of_all, *growing[1:], count=1)
    growing[1].output_ids += range(20)
    steps(of_all, *growing[1:])
    assert 190 < of_all.num_tokens <= 250
