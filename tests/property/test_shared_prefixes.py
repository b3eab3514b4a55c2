"""Groups of rows that share a prefix: what they claim is true, and no other choice spares more."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine import shared_prefixes
from baton.engine.shared_prefixes import MIN_ROWS, PrefixGroup, prefix_groups

BLOCK_SIZE, UNIT = 4, 8
MAX_BLOCKS = 8


@st.composite
def batches(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Tables over two block ids, so that many begin alike, with rubbish behind their ends."""
    num_rows = draw(st.integers(1, 12))
    ids = st.lists(st.integers(0, 1), min_size=MAX_BLOCKS, max_size=MAX_BLOCKS)
    pool = draw(st.lists(ids, min_size=1, max_size=4))
    rows = [draw(st.sampled_from(pool)) for _ in range(num_rows)]
    lengths = [draw(st.integers(1, MAX_BLOCKS * BLOCK_SIZE)) for _ in range(num_rows)]
    return np.array(rows, dtype=np.int32), np.array(lengths, dtype=np.int64)


def common_tokens(tables: np.ndarray, lengths: np.ndarray, rows: tuple[int, ...]) -> int:
    """By definition, token by token."""
    count = 0
    while all(count < lengths[row] - 1 for row in rows) and (
        len({int(tables[row, count // BLOCK_SIZE]) for row in rows}) == 1
    ):
        count += 1
    return count // UNIT * UNIT


def most_saved(tables: np.ndarray, lengths: np.ndarray) -> int:
    """Over all choices of disjoint groups, each of all rows that share its prefix."""
    maximal = set()
    for leader in range(len(tables)):
        for num_tokens in range(UNIT, MAX_BLOCKS * BLOCK_SIZE + 1, UNIT):
            rows = tuple(
                row
                for row in range(len(tables))
                if common_tokens(tables, lengths, (leader, row)) >= num_tokens
                and common_tokens(tables, lengths, (leader,)) >= num_tokens
            )
            if len(rows) >= MIN_ROWS:
                maximal.add((rows, num_tokens))
    candidates = list(maximal)
    return max(
        sum((len(rows) - 1) * tokens for rows, tokens in choice)
        for count in range(len(candidates) + 1)
        for choice in combinations(candidates, min(count, 3))
        if len({row for rows, _ in choice for row in rows}) == sum(len(r) for r, _ in choice)
    )


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from([1, 40, 80]))
def test_groups_are_true_and_the_best(batch: tuple[np.ndarray, np.ndarray], least: int) -> None:
    tables, lengths = batch
    before = shared_prefixes.MIN_SAVED_TOKENS
    shared_prefixes.MIN_SAVED_TOKENS = least
    try:
        groups = prefix_groups(tables, lengths, block_size=BLOCK_SIZE, unit_tokens=UNIT)
    finally:
        shared_prefixes.MIN_SAVED_TOKENS = before
    members = [row for group in groups for row in group.rows]
    assert len(set(members)) == len(members)
    for group in groups:
        assert len(group.rows) >= MIN_ROWS
        assert 0 < group.num_tokens == common_tokens(tables, lengths, group.rows)
    saved = sum(group.saved_tokens for group in groups)
    best = most_saved(tables, lengths)
    assert saved == (best if best >= least else 0)


def test_what_is_spared_decides_between_a_wide_and_a_deep_group() -> None:
    """20 rows share 1,024 tokens; 6 of them 8,192 or only 2,048."""
    lengths = np.full(20, 9_000)
    for deep, expected in ((8_192, (6, 8_192)), (2_048, (20, 1_024))):
        tables = np.arange(20 * 600, dtype=np.int32).reshape(20, 600)
        tables[:, : 1_024 // 16] = tables[0, : 1_024 // 16]
        tables[3:9, : deep // 16] = tables[3, : deep // 16]
        groups = prefix_groups(tables, lengths, block_size=16, unit_tokens=512)
        assert [(len(g.rows), g.num_tokens) for g in groups] == [expected]


def test_too_little_is_left_alone() -> None:
    tables = np.zeros((40, 64), dtype=np.int32)
    tables[:, -1] = np.arange(40)
    lengths = np.full(40, 1_010)
    for num_rows, is_worth_it in ((3, False), (32, False), (33, True)):
        groups = prefix_groups(
            tables[:num_rows], lengths[:num_rows], block_size=16, unit_tokens=512
        )
        expected = (PrefixGroup(tuple(range(num_rows)), 512),) if is_worth_it else ()
        assert groups == expected


def test_a_long_chain_of_rising_prefixes_does_not_recurse() -> None:
    tables = np.arange(2_000 * 8, dtype=np.int32).reshape(2_000, 8)
    for row in range(1, 2_000):
        tables[row, 0] = tables[0, 0]
    groups = prefix_groups(tables, np.full(2_000, 8 * 512), block_size=512, unit_tokens=512)
    assert [(len(g.rows), g.num_tokens) for g in groups] == [(2_000, 512)]
