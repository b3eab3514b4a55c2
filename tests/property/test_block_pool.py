"""The block pool against a model: each block free or with one owner, whatever happens."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.engine.block_pool import BlockPool, OutOfBlocks

NUM_BLOCKS = 9
OWNERS = ("a", "b", "c")


class BlockPoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, 4)
        self.held: dict[str, list[int]] = {owner: [] for owner in OWNERS}

    @property
    def num_held(self) -> int:
        return sum(map(len, self.held.values()))

    @rule(owner=st.sampled_from(OWNERS), count=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, owner: str, count: int) -> None:
        if count > NUM_BLOCKS - self.num_held:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(owner, count)
            return
        taken = self.pool.allocate(owner, count)
        assert len(set(taken)) == count
        assert not set(taken) & {b for blocks in self.held.values() for b in blocks}
        self.held[owner] += taken

    @rule(owner=st.sampled_from(OWNERS), data=st.data())
    def release(self, owner: str, data: st.DataObject) -> None:
        self.pool.release(owner, self._some_of(owner, data))

    @rule(owner=st.sampled_from(OWNERS), heir=st.sampled_from(OWNERS), data=st.data())
    def hand_over(self, owner: str, heir: str, data: st.DataObject) -> None:
        blocks = self._some_of(owner, data)
        self.pool.hand_over(owner, heir, blocks)
        self.held[heir] += blocks

    def _some_of(self, owner: str, data: st.DataObject) -> list[int]:
        blocks = data.draw(st.permutations(self.held[owner]))[: data.draw(st.integers(0, 4))]
        self.held[owner] = [b for b in self.held[owner] if b not in blocks]
        return list(blocks)

    @precondition(lambda self: self.num_held)
    @rule(data=st.data(), hands_over=st.booleans())
    def refuse_what_another_owns(self, data: st.DataObject, hands_over: bool) -> None:
        owner = data.draw(st.sampled_from([o for o in OWNERS if self.held[o]]))
        thief = data.draw(st.sampled_from([o for o in OWNERS if o != owner]))
        wrong = [*self.held[thief], self.held[owner][0]]
        if hands_over:
            with pytest.raises(AssertionError, match="does not own"):
                self.pool.hand_over(thief, "c", wrong)
        else:
            with pytest.raises(AssertionError, match="does not own"):
                self.pool.release(thief, wrong)

    @precondition(lambda self: self.num_held)
    @rule(data=st.data())
    def refuse_a_block_named_twice(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from([o for o in OWNERS if self.held[o]]))
        with pytest.raises(AssertionError, match="twice"):
            self.pool.release(owner, [self.held[owner][0]] * 2)

    @precondition(lambda self: self.num_held < NUM_BLOCKS)
    @rule(owner=st.sampled_from(OWNERS))
    def refuse_to_free_what_is_free(self, owner: str) -> None:
        held = {b for blocks in self.held.values() for b in blocks}
        free = next(b for b in range(NUM_BLOCKS) if b not in held)
        with pytest.raises(AssertionError, match="does not own"):
            self.pool.release(owner, [free])

    @invariant()
    def adds_up(self) -> None:
        assert self.pool.check_integrity() == []
        assert self.pool.num_free == NUM_BLOCKS - self.num_held
        assert self.pool.owners == {owner for owner in OWNERS if self.held[owner]}


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)]
)
def test_blocks_for_rounds_up(num_tokens: int, num_blocks: int) -> None:
    assert BlockPool(1, 4).blocks_for(num_tokens) == num_blocks


def test_check_integrity_sees_what_is_broken() -> None:
    """Broken from outside, each in one way."""
    lost = BlockPool(4, 4)
    lost._free.pop()
    assert lost.check_integrity() == ["3 free + 0 held blocks of 4"]
    doubled = BlockPool(4, 4)
    doubled._free[0] = doubled._free[1]
    assert "a block is free twice" in doubled.check_integrity()
    both = BlockPool(4, 4)
    [block] = both.allocate("a", 1)
    both._free[0] = block
    assert "a free block has an owner" in both.check_integrity()
    miscounted = BlockPool(4, 4)
    miscounted.allocate("a", 2)
    miscounted._num_held["a"] = 1
    assert miscounted.check_integrity() == ["owners' counts do not add up"]
