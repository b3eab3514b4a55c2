"""The block pool against a model: who holds each block and what it is known for."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.engine.block_pool import BlockPool, OutOfBlocks
from baton.protocol.block_hash import BlockKey

NUM_BLOCKS = 9
OWNERS = ("a", "b", "c")
KEYS = tuple(BlockKey(bytes([i]) * 16) for i in range(4))


class BlockPoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, 4)
        self.held: dict[str, list[int]] = {owner: [] for owner in OWNERS}
        self.keys: dict[int, BlockKey] = {}
        self.kept: list[int] = []
        """Free blocks with a key, the next to be lost first."""

    def _holders(self, block: int) -> set[str]:
        return {owner for owner in OWNERS if block in self.held[owner]}

    @property
    def num_free(self) -> int:
        return sum(not self._holders(block) for block in range(NUM_BLOCKS))

    @rule(owner=st.sampled_from(OWNERS), count=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, owner: str, count: int) -> None:
        if count > self.num_free:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(owner, count)
            return
        num_lost = max(0, count - (self.num_free - len(self.kept)))
        taken = self.pool.allocate(owner, count)
        assert len(set(taken)) == count
        assert not any(self._holders(block) for block in taken)
        lost, self.kept = self.kept[:num_lost], self.kept[num_lost:]
        assert [b for b in taken if b in self.keys] == lost, "oldest first, and none too early"
        for block in lost:
            del self.keys[block]
        self.held[owner] += taken

    @rule(owner=st.sampled_from(OWNERS), data=st.data())
    def release(self, owner: str, data: st.DataObject) -> None:
        blocks = self._some_of(owner, data)
        self.pool.release(owner, blocks)
        self.kept += [b for b in reversed(blocks) if b in self.keys and not self._holders(b)]

    @rule(owner=st.sampled_from(OWNERS), heir=st.sampled_from(OWNERS), data=st.data())
    def hand_over(self, owner: str, heir: str, data: st.DataObject) -> None:
        blocks = self._some_of(owner, data)
        if heir != owner and set(blocks) & set(self.held[heir]):
            self.held[owner] += blocks
            return
        self.pool.hand_over(owner, heir, blocks)
        self.held[heir] += blocks

    def _some_of(self, owner: str, data: st.DataObject) -> list[int]:
        blocks = data.draw(st.permutations(self.held[owner]))[: data.draw(st.integers(0, 4))]
        self.held[owner] = [b for b in self.held[owner] if b not in blocks]
        return list(blocks)

    @precondition(lambda self: self.num_free < NUM_BLOCKS)
    @rule(data=st.data(), key=st.sampled_from(KEYS))
    def publish(self, data: st.DataObject, key: BlockKey) -> None:
        held = [b for b in range(NUM_BLOCKS) if self._holders(b) and b not in self.keys]
        if not held:
            return
        block = data.draw(st.sampled_from(held))
        is_new = key not in self.keys.values()
        assert self.pool.publish(block, key) is is_new
        if is_new:
            self.keys[block] = key

    @rule(owner=st.sampled_from(OWNERS), key=st.sampled_from(KEYS))
    def share(self, owner: str, key: BlockKey) -> None:
        block = self.pool.find(key)
        if block is None or owner in self._holders(block):
            return
        self.pool.share(owner, [block])
        self.held[owner].append(block)
        if block in self.kept:
            self.kept.remove(block)

    @rule(blocks=st.lists(st.integers(0, NUM_BLOCKS - 1), max_size=3))
    def forget(self, blocks: list[int]) -> None:
        self.pool.forget(blocks)
        for block in blocks:
            self.keys.pop(block, None)
            self.kept = [b for b in self.kept if b != block]

    @precondition(lambda self: self.num_free < NUM_BLOCKS)
    @rule(data=st.data(), hands_over=st.booleans())
    def refuse_what_another_owns(self, data: st.DataObject, hands_over: bool) -> None:
        owner = data.draw(st.sampled_from([o for o in OWNERS if self.held[o]]))
        thief = data.draw(st.sampled_from([o for o in OWNERS if o != owner]))
        theirs = [b for b in self.held[owner] if b not in self.held[thief]]
        if not theirs:
            return
        wrong = [*self.held[thief], theirs[0]]
        if hands_over:
            with pytest.raises(AssertionError, match="does not own"):
                self.pool.hand_over(thief, "c", wrong)
        else:
            with pytest.raises(AssertionError, match="does not own"):
                self.pool.release(thief, wrong)

    @precondition(lambda self: self.num_free < NUM_BLOCKS)
    @rule(data=st.data())
    def refuse_a_block_named_twice(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from([o for o in OWNERS if self.held[o]]))
        with pytest.raises(AssertionError, match="twice"):
            self.pool.release(owner, [self.held[owner][0]] * 2)

    @precondition(lambda self: self.num_free)
    @rule(owner=st.sampled_from(OWNERS))
    def refuse_what_is_free(self, owner: str) -> None:
        free = next(b for b in range(NUM_BLOCKS) if not self._holders(b))
        with pytest.raises(AssertionError, match="does not own"):
            self.pool.release(owner, [free])
        with pytest.raises(AssertionError, match="not held"):
            self.pool.publish(free, KEYS[0])

    @invariant()
    def adds_up(self) -> None:
        pool = self.pool
        assert pool.check_integrity() == []
        assert pool.num_free == self.num_free
        assert pool.num_kept == len(self.kept)
        assert pool.owners == {owner for owner in OWNERS if self.held[owner]}
        for block in range(NUM_BLOCKS):
            assert pool.holders(block) == self._holders(block)
            assert pool.num_holders(block) == len(self._holders(block))
        for key in KEYS:
            known = pool.find(key)
            assert (known is not None) == (key in self.keys.values())
            assert known is None or self.keys[known] == key


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)]
)
def test_blocks_for_rounds_up(num_tokens: int, num_blocks: int) -> None:
    assert BlockPool(1, 4).blocks_for(num_tokens) == num_blocks


def test_a_block_is_free_when_its_last_holder_gives_it_back() -> None:
    pool = BlockPool(2, 4)
    [block] = pool.allocate("a", 1)
    pool.publish(block, KEYS[0])
    pool.share("b", [block])
    pool.release("a", [block])
    assert (pool.num_free, pool.num_kept, pool.owners) == (1, 0, {"b"})
    pool.release("b", [block])
    assert (pool.num_free, pool.num_kept, pool.owners) == (2, 1, frozenset())
    assert pool.find(KEYS[0]) == block
    assert block not in pool.allocate("c", 1), "blank blocks go first"
    assert pool.allocate("c", 1) == [block]
    assert pool.find(KEYS[0]) is None


def test_what_nobody_may_share() -> None:
    pool = BlockPool(2, 4)
    [block] = pool.allocate("a", 1)
    with pytest.raises(AssertionError, match="no key"):
        pool.share("b", [block])
    pool.publish(block, KEYS[0])
    with pytest.raises(AssertionError, match="already"):
        pool.share("a", [block])
    with pytest.raises(AssertionError, match="already"):
        pool.publish(block, KEYS[1])


def test_check_integrity_sees_what_is_broken() -> None:
    """Broken from outside, each in one way."""
    lost = BlockPool(4, 4)
    lost._blank.pop()
    assert lost.check_integrity() == ["3 free + 0 held blocks of 4"]
    doubled = BlockPool(4, 4)
    doubled._blank[0] = doubled._blank[1]
    assert doubled.check_integrity() == ["a block is free twice"]
    both = BlockPool(4, 4)
    [block] = both.allocate("a", 1)
    both._blank[0] = block
    assert "a free block has an owner" in both.check_integrity()
    miscounted = BlockPool(4, 4)
    miscounted.allocate("a", 2)
    miscounted._num_held["a"] = 1
    assert miscounted.check_integrity() == ["owners' counts do not add up"]
    nobody = BlockPool(4, 4)
    [block] = nobody.allocate("a", 1)
    nobody._holders[block] = set()
    assert "a held block has no holder" in nobody.check_integrity()
    renamed = BlockPool(4, 4)
    renamed.publish(renamed.allocate("a", 1)[0], KEYS[0])
    renamed._key_of[3] = KEYS[0]
    assert "keys and blocks do not match" in renamed.check_integrity()
    keyed = BlockPool(4, 4)
    keyed.publish(keyed.allocate("a", 1)[0], KEYS[0])
    keyed._kept.append(keyed._blank.pop())
    assert keyed.check_integrity() == ["a kept block has no key"]
    blank = BlockPool(4, 4)
    [block] = blank.allocate("a", 1)
    blank.publish(block, KEYS[0])
    blank.release("a", [block])
    blank._kept.remove(block)
    blank._blank.append(block)
    assert blank.check_integrity() == ["a blank block has a key"]
