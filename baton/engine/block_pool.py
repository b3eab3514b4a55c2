"""Ownership of KV blocks. Pure: it hands out ids and knows no tensor.

Invariant: every block is free or has named holders; it becomes free only when each of them,
by name, has given it back. A block may also have a key that says what its rows hold. A block
with a key that nobody holds counts as free and keeps its contents until it is needed: the
one unused for longest goes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from baton.engine.kept_blocks import KeptBlocks
from baton.protocol.block_hash import BlockKey

NUM_SHARDS = 256
"""Of what leads from keys to blocks, by a byte of the key, which is a hash. One dict of a large
pool's keys would take several milliseconds of some step whenever it is rehashed."""


class OutOfBlocks(Exception):
    """Not an error of the user's: callers ask ``num_free`` first, or preempt."""


class BlockPool:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._blank = list(range(num_blocks - 1, -1, -1))
        """Free, and nothing in them is worth keeping."""
        self._kept = KeptBlocks(num_blocks)
        """Free, with a key."""
        self._holders: list[str | set[str] | None] = [None] * num_blocks
        """Most blocks have one holder; a set for each of them would keep the collector busy."""
        self._num_held: dict[str, int] = {}
        self._key_of: list[BlockKey | None] = [None] * num_blocks
        self._block_of: tuple[dict[BlockKey, int], ...] = tuple({} for _ in range(NUM_SHARDS))

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Free blocks whose contents can still be found."""
        return len(self._kept)

    @property
    def owners(self) -> frozenset[str]:
        return frozenset(self._num_held)

    def holders(self, block: int) -> frozenset[str]:
        held = self._holders[block]
        return frozenset([held] if isinstance(held, str) else held or ())

    def num_holders(self, block: int) -> int:
        held = self._holders[block]
        return 1 if isinstance(held, str) else len(held or ())

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, owner: str, count: int) -> list[int]:
        """All or nothing: raises OutOfBlocks and then nothing has changed."""
        if count > self.num_free:
            raise OutOfBlocks(f"{owner} wants {count} blocks, {self.num_free} are free")
        if count == 0:
            return []
        taken = self._blank[-count:][::-1]
        del self._blank[-count:]
        while len(taken) < count:
            block = self._kept.pop_oldest()
            self._unname(block)
            taken.append(block)
        for block in taken:
            self._holders[block] = owner
        self._num_held[owner] = self._num_held.get(owner, 0) + count
        return taken

    def share(self, owner: str, blocks: Sequence[int]) -> None:
        """Hold blocks that have a key beside whoever holds them, or out of the free ones."""
        key_of, holders = self._key_of, self._holders
        for block in blocks:
            assert key_of[block] is not None, f"{owner} shares block {block}, which has no key"
            if holders[block] is None:
                self._kept.remove(block)
            self._add(block, owner)
        if blocks:
            self._num_held[owner] = self._num_held.get(owner, 0) + len(blocks)

    def release(self, owner: str, blocks: Sequence[int]) -> None:
        """Give blocks back, named in the order of their tokens: of two kept ones, the later is
        of no use without the earlier, and goes first."""
        self._check_owner(owner, blocks)
        key_of, holders = self._key_of, self._holders
        for block in reversed(blocks):
            if isinstance(holders[block], set) and self._take_away(block, owner):
                continue
            holders[block] = None
            if key_of[block] is None:
                self._blank.append(block)
            else:
                self._kept.append(block)
        self._lose(owner, len(blocks))

    def hand_over(self, owner: str, heir: str, blocks: Sequence[int]) -> None:
        """The blocks keep their contents and other holders; ``heir`` takes ``owner``'s place."""
        self._check_owner(owner, blocks)
        for block in blocks:
            self._take_away(block, owner)
            self._add(block, heir)
        self._lose(owner, len(blocks))
        if blocks:
            self._num_held[heir] = self._num_held.get(heir, 0) + len(blocks)

    def publish(self, block: int, key: BlockKey) -> bool:
        """A held block's rows are complete and final: let ``find`` lead to it.

        False when another block has that key: this one then stays its holders' alone.
        """
        assert self._holders[block] is not None, f"block {block} is not held"
        assert self._key_of[block] is None, f"block {block} has a key already"
        if self._block_of[key[0]].setdefault(key, block) != block:
            return False
        self._key_of[block] = key
        return True

    def find(self, key: BlockKey) -> int | None:
        return self._block_of[key[0]].get(key)

    def forget(self, blocks: Iterable[int]) -> None:
        """Take the keys away: the contents are doubtful, or about to be overwritten."""
        for block in blocks:
            if self._key_of[block] is None:
                continue
            self._unname(block)
            if self._holders[block] is None:
                self._kept.remove(block)
                self._blank.append(block)

    def check_integrity(self) -> list[str]:
        """Sentences about broken invariants; empty when all is well."""
        problems = []
        free = [*self._blank, *self._kept]
        held = [block for block, by in enumerate(self._holders) if by is not None]
        if len(held) + len(free) != self.num_blocks:
            problems.append(f"{len(free)} free + {len(held)} held blocks of {self.num_blocks}")
        if len(set(free)) != len(free):
            problems.append("a block is free twice")
        if not set(held).isdisjoint(free):
            problems.append("a free block has an owner")
        counts: dict[str, int] = {}
        for block in held:
            if not self._holders[block]:
                problems.append("a held block has no holder")
            for owner in self.holders(block):
                counts[owner] = counts.get(owner, 0) + 1
        if counts != self._num_held:
            problems.append("owners' counts do not add up")
        named = {block: key for block, key in enumerate(self._key_of) if key is not None}
        if {block: key for shard in self._block_of for key, block in shard.items()} != named:
            problems.append("keys and blocks do not match")
        if any(self._key_of[block] is not None for block in self._blank):
            problems.append("a blank block has a key")
        if any(self._key_of[block] is None for block in self._kept):
            problems.append("a kept block has no key")
        return problems

    def _check_owner(self, owner: str, blocks: Sequence[int]) -> None:
        holders = self._holders
        # Nearly all have one holder: look closer only where that is not all there is to it.
        if any(holders[block] != owner for block in blocks):
            wrong = [b for b in blocks if not self._holds(owner, b)]
            assert not wrong, f"{owner} does not own blocks {wrong[:8]}"
        assert len(set(blocks)) == len(blocks), f"{owner} names a block twice"

    def _holds(self, owner: str, block: int) -> bool:
        held = self._holders[block]
        return owner in held if isinstance(held, set) else held == owner

    def _add(self, block: int, owner: str) -> None:
        held = self._holders[block]
        assert not self._holds(owner, block), f"{owner} holds block {block} already"
        if held is None:
            self._holders[block] = owner
        elif isinstance(held, str):
            self._holders[block] = {held, owner}
        else:
            held.add(owner)

    def _take_away(self, block: int, owner: str) -> bool:
        """Whether others hold it still."""
        held = self._holders[block]
        if isinstance(held, set) and len(held) > 1:
            held.remove(owner)
            return True
        self._holders[block] = None
        return False

    def _unname(self, block: int) -> None:
        key = self._key_of[block]
        assert key is not None
        self._key_of[block] = None
        del self._block_of[key[0]][key]

    def _lose(self, owner: str, count: int) -> None:
        if count == 0:
            return
        left = self._num_held[owner] - count
        if left:
            self._num_held[owner] = left
        else:
            del self._num_held[owner]
