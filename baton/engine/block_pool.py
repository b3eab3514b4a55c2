"""Ownership of KV blocks. Pure: it hands out ids and knows no tensor.

Invariant: every block is free or has exactly one named owner; it becomes free only when
that owner, by name, gives it back.
"""

from __future__ import annotations

from collections.abc import Sequence


class OutOfBlocks(Exception):
    """Not an error of the user's: callers ask ``num_free`` first, or preempt."""


class BlockPool:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owner: list[str | None] = [None] * num_blocks
        self._num_held: dict[str, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def owners(self) -> frozenset[str]:
        return frozenset(self._num_held)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, owner: str, count: int) -> list[int]:
        """All or nothing: raises OutOfBlocks and then nothing has changed."""
        if count > len(self._free):
            raise OutOfBlocks(f"{owner} wants {count} blocks, {len(self._free)} are free")
        if count == 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        for block in taken:
            self._owner[block] = owner
        self._num_held[owner] = self._num_held.get(owner, 0) + count
        return taken

    def release(self, owner: str, blocks: Sequence[int]) -> None:
        self._check_owner(owner, blocks)
        for block in blocks:
            self._owner[block] = None
        self._free.extend(blocks)
        self._lose(owner, len(blocks))

    def hand_over(self, owner: str, heir: str, blocks: Sequence[int]) -> None:
        """The blocks keep their contents and change their owner."""
        self._check_owner(owner, blocks)
        for block in blocks:
            self._owner[block] = heir
        self._lose(owner, len(blocks))
        if blocks:
            self._num_held[heir] = self._num_held.get(heir, 0) + len(blocks)

    def check_integrity(self) -> list[str]:
        """Sentences about broken invariants; empty when all is well."""
        problems = []
        held = [block for block, owner in enumerate(self._owner) if owner is not None]
        if len(held) + len(self._free) != self.num_blocks:
            problems.append(
                f"{len(self._free)} free + {len(held)} held blocks of {self.num_blocks}"
            )
        if len(set(self._free)) != len(self._free):
            problems.append("a block is free twice")
        if any(self._owner[block] is not None for block in self._free):
            problems.append("a free block has an owner")
        counts: dict[str, int] = {}
        for block in held:
            owner = self._owner[block]
            assert owner is not None
            counts[owner] = counts.get(owner, 0) + 1
        if counts != self._num_held:
            problems.append("owners' counts do not add up")
        return problems

    def _check_owner(self, owner: str, blocks: Sequence[int]) -> None:
        wrong = [b for b in blocks if self._owner[b] != owner]
        assert not wrong, f"{owner} does not own blocks {wrong[:8]}"
        assert len(set(blocks)) == len(blocks), f"{owner} names a block twice"

    def _lose(self, owner: str, count: int) -> None:
        if count == 0:
            return
        left = self._num_held[owner] - count
        if left:
            self._num_held[owner] = left
        else:
            del self._num_held[owner]
