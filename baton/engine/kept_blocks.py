"""Free blocks whose contents are worth keeping, the one unused for longest first. Pure.

A list linked through two arrays as long as the pool: every operation takes the same short time,
and nothing is ever rehashed in the middle of a step.
"""

from __future__ import annotations

from collections.abc import Iterator

ABSENT = -1


class KeptBlocks:
    def __init__(self, num_blocks: int) -> None:
        # The last place is the list's two ends.
        self._end = num_blocks
        self._after = [ABSENT] * num_blocks + [num_blocks]
        self._before = [ABSENT] * num_blocks + [num_blocks]
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        block = self._after[self._end]
        while block != self._end:
            yield block
            block = self._after[block]

    def append(self, block: int) -> None:
        """It is the one used last."""
        assert self._after[block] == ABSENT, f"block {block} is kept already"
        end = self._end
        last = self._before[end]
        self._after[last] = self._before[end] = block
        self._before[block], self._after[block] = last, end
        self._count += 1

    def remove(self, block: int) -> None:
        before, after = self._before[block], self._after[block]
        assert after != ABSENT, f"block {block} is not kept"
        self._after[before], self._before[after] = after, before
        self._after[block] = self._before[block] = ABSENT
        self._count -= 1

    def pop_oldest(self) -> int:
        after, before, end = self._after, self._before, self._end
        block = after[end]
        assert block != end
        after[end] = second = after[block]
        before[second] = end
        after[block] = before[block] = ABSENT
        self._count -= 1
        return block
