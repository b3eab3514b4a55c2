"""Which waiting sequences get a seat and blocks. Pure.

The most urgent first, whole (blocks for all the tokens it knows), and nobody passes one that
does not fit yet. One exception: a sequence that begins like one being computed steps aside
until it can share those blocks. It is passed only as long as a more urgent one, which has the
budget before it anyway, computes; so it loses no step.
"""

from __future__ import annotations

from baton.engine.block_pool import BlockPool
from baton.engine.host_swap import HostSwap
from baton.engine.prefix_cache import NOTHING, Found, PrefixCache
from baton.engine.running_set import RunningSet
from baton.engine.sequence import Sequence
from baton.engine.wait_queue import WaitQueue
from baton.protocol.config import EngineConfig


class Admission:
    def __init__(
        self,
        config: EngineConfig,
        pool: BlockPool,
        waiting: WaitQueue,
        running: RunningSet,
        cache: PrefixCache | None,
        swap: HostSwap | None,
    ) -> None:
        self._seats = config.max_num_seqs
        self.watermark_blocks = int(config.watermark * pool.num_blocks)
        self._pool = pool
        self._waiting = waiting
        self._running = running
        self._cache = cache
        self._swap = swap
        self.num_blocked = 0
        """Steps at which the most urgent waiting sequence did not fit into the free blocks."""

    def admit(self, budget: int, single_cost: int = 1) -> list[tuple[Sequence, int]]:
        """Those that now run, and of how many tokens the first step is to be. Each runs in it:
        copies into the blocks of one that does not could go on after it is dropped.
        single_cost: of running one token and no more."""
        admitted = []
        while budget > 0:
            sequence, found = self._next()
            if sequence is None:
                break
            if not self._fits(sequence, found.blocks):
                self.num_blocked += 1
                break
            known = max(sequence.num_computed, len(found.blocks) * self._pool.block_size)
            count = min(sequence.num_tokens - known, budget)
            cost = single_cost if count == 1 else count
            if cost > budget:
                break
            self._waiting.remove(sequence)
            self._seat(sequence, found)
            admitted.append((sequence, count))
            budget -= cost
        return admitted

    def next_fits(self) -> bool | None:
        """Whether ``admit`` would let one in now; None when nobody asks."""
        sequence, found = self._next()
        return None if sequence is None else self._fits(sequence, found.blocks)

    def _next(self) -> tuple[Sequence | None, Found]:
        """The most urgent one that need not step aside, if there is a seat."""
        while len(self._running) < self._seats:
            sequence = self._waiting.peek()
            # Each look at one that steps aside costs time: no more of them than could ever run.
            if sequence is None or self._waiting.num_parked >= self._seats:
                break
            found = NOTHING if self._cache is None else self._cache.find(sequence)
            if found.awaited is None or sequence.host_blocks:
                return sequence, found
            self._waiting.park(sequence, found.awaited)
        return None, NOTHING

    def _fits(self, sequence: Sequence, found: tuple[int, ...]) -> bool:
        """Found blocks that nobody holds count as free, but are not free for the rest."""
        need = self._pool.blocks_for(sequence.num_tokens) - len(found)
        unheld = sum(self._pool.num_holders(block) == 0 for block in found)
        spare = self.watermark_blocks if self._running else 0
        return need + unheld + spare <= self._pool.num_free

    def _seat(self, sequence: Sequence, found: Found) -> None:
        """Give it its blocks, and KV for as many of its tokens as there is somewhere."""
        cached = found.blocks
        need = self._pool.blocks_for(sequence.num_tokens) - len(cached)
        self._pool.share(sequence.seq_id, cached)
        sequence.block_table = cached + tuple(self._pool.allocate(sequence.seq_id, need))
        sequence.num_named = len(cached)
        sequence.num_cached = len(cached) * self._pool.block_size
        if sequence.host_blocks:
            assert self._swap is not None
            self._swap.back(sequence, len(cached))
        sequence.num_computed = max(sequence.num_computed, sequence.num_cached)
        self._running.add(sequence)
        if self._cache is not None:
            self._cache.admitted(sequence, found)
