"""Guessing from earlier text, against looking for it the slow way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.engine import prompt_lookup
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


def test_memory_is_bounded_and_the_newest_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_lookup, "MAX_INDEXED_TOKENS", 64)
    lookup = PromptLookup()
    for number in range(1_000):
        lookup.extend([number])
        assert len(lookup._tokens) <= 64
    assert lookup.num_seen == 1_000
    lookup.extend(range(980, 985))
    assert lookup.propose(3) == [985, 986, 987]
    lookup.extend(range(5))
    assert lookup.propose(3) == []
