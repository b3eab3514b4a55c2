"""Who is in the engine, and what each holds: a seat or a place in the queue, blocks, cached names.

Pure. Every way in, out and between waiting and running goes through here, so that blocks, the
prefix cache and host memory always agree with who is where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from baton.engine.block_pool import BlockPool
from baton.engine.host_swap import HostSwap
from baton.engine.prefix_cache import PrefixCache
from baton.engine.running_set import RunningSet
from baton.engine.sequence import Sequence
from baton.engine.wait_queue import WaitQueue
from baton.protocol.block_hash import EXACT, BlockKey


class Residents:
    """on_stop: told of each sequence that runs no more. gone: ids of those that left, for the
    next plan."""

    def __init__(
        self,
        pool: BlockPool,
        cache: PrefixCache | None,
        swap: HostSwap | None,
        on_stop: Callable[[Sequence], None],
    ) -> None:
        self.pool = pool
        self.cache = cache
        self.swap = swap
        self.waiting = WaitQueue()
        self.running = RunningSet()
        self.sequences: dict[str, Sequence] = {}
        self.gone: list[str] = []
        self.num_preemptions = 0
        self._num_arrived = 0
        self._on_stop = on_stop

    def register(self, sequence: Sequence) -> None:
        assert sequence.seq_id not in self.sequences, f"{sequence.seq_id} is here already"
        sequence.arrived(self._num_arrived)
        self._num_arrived += 1
        self.sequences[sequence.seq_id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """It leaves; its blocks stay its own until ``free``, or go to an heir."""
        del self.sequences[sequence.seq_id]
        self.gone.append(sequence.seq_id)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            self._stop(sequence)

    def _stop(self, sequence: Sequence) -> None:
        """It runs no more: whoever waits for what it was to compute may look again."""
        self.running.remove(sequence)
        self._on_stop(sequence)
        if self.cache is not None:
            self._wake(self.cache.left(sequence))

    def _wake(self, keys: Iterable[BlockKey]) -> None:
        for key in keys:
            self.waiting.wake(key)

    def free(self, sequence: Sequence) -> None:
        """Give back all that it holds, here and in host memory."""
        blocks, sequence.block_table = sequence.block_table, ()
        self.pool.release(sequence.seq_id, blocks)
        sequence.num_computed = sequence.num_named = sequence.complete_from = 0
        sequence.quality = EXACT
        if self.swap is not None:
            self.swap.drop(sequence)

    def name_blocks(self, sequence: Sequence, num_computed: int) -> None:
        """Its first ``num_computed`` tokens have KV: let others find the blocks they fill."""
        if self.cache is not None:
            self._wake(self.cache.computed(sequence, num_computed))

    def grow(self, sequence: Sequence) -> bool:
        """One more block for ``sequence``, at the cost of less urgent ones; False when it was
        the least urgent itself."""
        swap = self.swap
        while not self.pool.num_free and not (swap and swap.num_reusable):
            victim = self.running.least_urgent
            self._preempt(victim)
            if victim is sequence:
                return False
        if self.pool.num_free:
            blocks = self.pool.allocate(sequence.seq_id, 1)
        else:
            assert swap is not None
            blocks = swap.reuse(sequence.seq_id, 1)
        sequence.block_table += tuple(blocks)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.num_preemptions += 1
        victim.num_preemptions += 1
        self._stop(victim)
        if self.swap is not None and self.swap.pays(victim):
            self.swap.out(victim)
        else:
            self.free(victim)
        self.waiting.push(victim)

    def check_integrity(self) -> list[str]:
        problems = self.pool.check_integrity() + self.waiting.check_integrity()
        problems += self.running.check_integrity()
        running = {s.seq_id for s in self.running}
        for seq_id in running - set(self.sequences):
            problems.append(f"{seq_id} runs but is not registered")
        for seq_id in set(self.sequences) - running - self.waiting.ids():
            problems.append(f"{seq_id} neither waits nor runs")
        if self.cache is not None:
            problems += self.cache.check_integrity(running, self.waiting.parked_at())
        if self.swap is not None:
            problems += self.swap.check_integrity()
        return problems
