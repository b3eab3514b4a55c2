"""Whatever the ranks and blocks of both sides: each element arrives once, at the right place.

Arrays are filled and read back slot by slot here, by the definition of a slot; the plan under
test is what moves anything between them.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.protocol.errors import InternalError
from baton.protocol.reshard import Copy, Placed, heads_of, plan_copies

RANKS = (1, 2, 4, 8)
PAIRS = list(itertools.product(RANKS, RANKS))
BLOCK_SIZES = (8, 12, 16, 24, 32, 48, 64)
HEADS = (1, 2, 4, 8, 16, 24)
NOTHING = -1


def shared_by(num_ranks: int, num_heads: int) -> bool:
    return num_heads % num_ranks == 0 or num_ranks % num_heads == 0


def table(rng: random.Random, num_blocks: int, spare: int) -> tuple[int, ...]:
    """Partly in the order of memory, as allocation often leaves it."""
    ids = list(range(num_blocks + spare))
    if rng.random() < 0.6:
        cut = rng.randrange(len(ids))
        ids = ids[cut:] + ids[:cut]
    else:
        rng.shuffle(ids)
    return tuple(ids[:num_blocks])


def arrays(side: Placed, num_heads: int) -> list[np.ndarray]:
    """By rank ``[slots, heads]``, all NOTHING."""
    num_slots = (max(side.block_table) + 1) * side.block_size
    return [
        np.full((num_slots, len(heads_of(rank, side.num_ranks, num_heads))), NOTHING)
        for rank in range(side.num_ranks)
    ]


def slot(side: Placed, position: int) -> int:
    return side.block_table[position // side.block_size] * side.block_size + (
        position % side.block_size
    )


def expected(side: Placed, num_heads: int, tokens: range) -> list[np.ndarray]:
    """Element (position, head) holds position * num_heads + head."""
    filled = arrays(side, num_heads)
    for rank, own in enumerate(filled):
        for position in tokens:
            for place, head in enumerate(heads_of(rank, side.num_ranks, num_heads)):
                own[slot(side, position), place] = position * num_heads + head
    return filled


def carry_out(
    copies: list[Copy], source: Placed, target: Placed, num_heads: int, tokens: range
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What the target holds then, and how often each of its elements was written."""
    held = expected(source, num_heads, range(len(source.block_table) * source.block_size))
    found = arrays(target, num_heads)
    times = [np.zeros_like(own) for own in found]
    for c in copies:
        begin = c.source_block * source.block_size + c.source_offset
        end = c.target_block * target.block_size + c.target_offset
        rows = slice(end, end + c.num_tokens)
        heads = slice(c.target_head, c.target_head + c.num_heads)
        part = held[c.source_rank][
            begin : begin + c.num_tokens, c.source_head : c.source_head + c.num_heads
        ]
        assert part.shape == (c.num_tokens, c.num_heads)
        found[c.target_rank][rows, heads] = part
        times[c.target_rank][rows, heads] += 1
    return found, times


def fewest_runs(source: Placed, target: Placed, tokens: range) -> int:
    """Position by position: a new run wherever either side's next slot is not the next one."""
    slots = [(slot(source, p), slot(target, p)) for p in tokens]
    return sum(
        n == 0 or slots[n] != (slots[n - 1][0] + 1, slots[n - 1][1] + 1) for n in range(len(slots))
    )


def check(num_heads: int, source: Placed, target: Placed, tokens: range) -> list[Copy]:
    copies = plan_copies(num_heads, source, target, tokens)
    found, times = carry_out(copies, source, target, num_heads, tokens)
    wanted = expected(target, num_heads, tokens)
    for rank in range(target.num_ranks):
        assert np.array_equal(found[rank], wanted[rank]), rank
        assert np.array_equal(times[rank], wanted[rank] != NOTHING), rank
    readers: dict[int, set[int]] = {}
    for c in copies:
        first = heads_of(c.source_rank, source.num_ranks, num_heads).start + c.source_head
        for head in range(first, first + c.num_heads):
            readers.setdefault(head, set()).add(c.source_rank)
    assert all(len(ranks) == 1 for ranks in readers.values()), "a head is read from one rank"
    pairs = Counter((c.source_rank, c.target_rank) for c in copies)
    assert set(pairs.values()) <= {fewest_runs(source, target, tokens)}
    return copies


@pytest.mark.parametrize(("num_source", "num_target"), PAIRS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_every_element_arrives_once_at_the_right_place(
    num_source: int, num_target: int, data: st.DataObject
) -> None:
    num_heads = data.draw(
        st.sampled_from([n for n in HEADS if shared_by(num_source, n) and shared_by(num_target, n)])
    )
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    sizes = data.draw(st.tuples(st.sampled_from(BLOCK_SIZES), st.sampled_from(BLOCK_SIZES)))
    stop = data.draw(st.integers(0, 150))
    tokens = range(data.draw(st.integers(0, stop)), stop)
    source, target = (
        Placed(num_ranks, size, table(rng, -(-stop // size) + rng.randrange(1, 3), 3))
        for num_ranks, size in zip((num_source, num_target), sizes, strict=True)
    )
    check(num_heads, source, target, tokens)


@pytest.mark.parametrize(("num_source", "num_target"), PAIRS)
def test_every_pair_of_block_sizes(num_source: int, num_target: int) -> None:
    """8 to 64, all of them once with each other side's rank count."""
    rng = random.Random(num_source * 10 + num_target)
    for size in range(8, 65):
        other = rng.randrange(8, 65)
        source = Placed(num_source, size, table(rng, -(-100 // size), 2))
        target = Placed(num_target, other, table(rng, -(-100 // other), 2))
        start = rng.randrange(100)
        check(8, source, target, range(start, rng.randrange(start, 101)))


def test_what_lies_in_order_on_both_sides_is_one_copy() -> None:
    source, target = Placed(1, 16, range(5, 12)), Placed(1, 24, range(3, 9))
    assert check(4, source, target, range(3, 101)) == [
        Copy(0, 5, 3, 0, 0, 3, 3, 0, num_tokens=98, num_heads=4)
    ]


def test_two_ranks_to_one() -> None:
    source, target = Placed(2, 16, (7, 2)), Placed(1, 32, (4,))
    assert check(4, source, target, range(20)) == [
        Copy(0, 7, 0, 0, 0, 4, 0, 0, num_tokens=16, num_heads=2),
        Copy(0, 2, 0, 0, 0, 4, 16, 0, num_tokens=4, num_heads=2),
        Copy(1, 7, 0, 0, 0, 4, 0, 2, num_tokens=16, num_heads=2),
        Copy(1, 2, 0, 0, 0, 4, 16, 2, num_tokens=4, num_heads=2),
    ]


def test_more_ranks_than_heads_keep_each_head_several_times() -> None:
    few, many = Placed(2, 8, (0,)), Placed(8, 8, (0,))
    assert [(c.source_rank, c.target_rank, c.num_heads) for c in check(2, few, many, range(5))] == [
        (rank // 4, rank, 1) for rank in range(8)
    ]
    assert [(c.source_rank, c.target_rank) for c in check(2, many, few, range(5))] == [
        (0, 0),
        (4, 1),
    ]


def test_nothing_to_copy() -> None:
    side = Placed(1, 8, (0,))
    assert plan_copies(2, side, side, range(3, 3)) == []


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (range(17), "positions 0 to 16 asked of 2 blocks of 8"),
        (range(-1, 3), "of a sequence"),
        (range(0, 8, 2), "of a sequence"),
    ],
)
def test_positions_that_are_not_there_are_refused(tokens: range, message: str) -> None:
    with pytest.raises(InternalError, match=message):
        plan_copies(2, Placed(1, 8, (0, 1)), Placed(1, 64, (0,)), tokens)


def test_heads_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(InternalError, match="6 KV heads cannot be divided among 4 ranks"):
        plan_copies(6, Placed(1, 8, (0,)), Placed(4, 8, (0,)), range(4))
