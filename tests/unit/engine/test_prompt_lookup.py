"""Guessing from earlier text, against looking for it the slow way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.engine.prompt_lookup import MATCH_TOKENS, PromptLookup


def slowly(tokens: list[int], count: int) -> list[int]:
    for length in MATCH_TOKENS:
        end = tokens[-length:]
        for place in range(len(tokens) - 1, length - 1, -1):
            if tokens[place - length : place] == end:
                copied: list[int] = list(tokens)
                for i in range(count):
                    copied.append(copied[place + i])
                return copied[len(tokens) :]
    return []


@given(
    parts=st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=9), count=st.integers(1, 12)
)
def test_the_latest_of_the_longest_matches_is_copied(parts: list[list[int]], count: int) -> None:
    lookup, tokens = PromptLookup(), list[int]()
    for part in parts:
        lookup.extend(part)
        tokens += part
        assert lookup.num_seen == len(tokens)
        assert lookup.propose(count) == slowly(tokens, count)


def test_what_repeats_with_a_period_goes_on_repeating() -> None:
    lookup = PromptLookup()
    lookup.extend([1, 2, 3, 4] * 2)
    assert lookup.propose(10) == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]


@given(
    tokens=st.lists(st.integers(0, 2), max_size=60),
    start=st.integers(0, 9),
    cuts=st.lists(st.integers(1, 12), max_size=5),
)
def test_what_is_forgotten_is_as_if_it_had_never_been(
    tokens: list[int], start: int, cuts: list[int]
) -> None:
    """Tokens come and the oldest go, in turns."""
    lookup, kept, behind = PromptLookup(start), list[int](), list(tokens)
    for cut in [*cuts, len(tokens)]:
        lookup.extend(behind[:cut])
        kept += behind[:cut]
        del behind[:cut]
        lookup.forget(min(cut // 2, len(kept)))
        del kept[: cut // 2]
        assert len(lookup) == len(kept)
        assert lookup.propose(4) == slowly(kept, 4)
    assert lookup.num_seen == start + len(tokens)


def test_nothing_is_kept_of_what_is_forgotten() -> None:
    lookup = PromptLookup()
    for number in range(1_000):
        lookup.extend([number])
        if number >= 64:
            lookup.forget(1)
    assert len(lookup) == 64
    assert len(lookup._tokens) <= 2 * 64
    assert all(len(behind) <= 64 for behind in lookup._behind)


def test_ids_of_any_size_are_told_apart() -> None:
    """Packed runs must not run into each other."""
    lookup = PromptLookup()
    lookup.extend([1, 2, 3, 7, 2**31, 0, 1, 2, 3 + 2**31, 9, 1, 2, 3])
    assert lookup.propose(1) == [7]
