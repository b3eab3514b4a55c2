"""What a hand-over needs of a block pool. ``baton.engine.block_pool.BlockPool`` fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Blocks(Protocol):
    @property
    def num_blocks(self) -> int: ...

    @property
    def num_free(self) -> int: ...

    def blocks_for(self, num_tokens: int) -> int: ...

    def allocate(self, owner: str, count: int) -> list[int]: ...

    def release(self, owner: str, blocks: Sequence[int]) -> None: ...
