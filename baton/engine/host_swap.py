"""Preempted sequences whose KV is in host memory, and the copies that a step is to make. Pure.

Device blocks that are being copied out stay held, as ``<seq_id>#swap``, until the step is
over: others may write into free blocks while a step runs. Chunks of the same step may have
them, for the step copies first.
"""

from __future__ import annotations

from baton.engine.block_pool import BlockPool
from baton.engine.plan import BlockSwap, StepPlan, StepResult
from baton.engine.preemption import EngineRates, RateMeter, swap_is_cheaper
from baton.engine.sequence import Sequence


class HostSwap:
    """block_bytes: of one KV block, all layers. num_layers: of the model."""

    def __init__(
        self, pool: BlockPool, num_host_blocks: int, block_bytes: int, num_layers: int = 1
    ) -> None:
        self._pool = pool
        self._host = BlockPool(num_host_blocks, pool.block_size)
        self._block_bytes = block_bytes
        self._meter = RateMeter(EngineRates(), block_bytes, num_layers)
        self._leaving: list[Sequence] = []
        self._leaving_blocks: dict[str, list[int]] = {}
        self._reusable: list[tuple[str, int]] = []
        self._returning: list[Sequence] = []
        self._out: list[BlockSwap] = []
        self._in: list[BlockSwap] = []
        self.num_swapped_out = 0

    @property
    def rates(self) -> EngineRates:
        return self._meter.rates

    @rates.setter
    def rates(self, rates: EngineRates) -> None:
        self._meter.rates = rates

    @property
    def num_host_free(self) -> int:
        return self._host.num_free

    @property
    def num_reusable(self) -> int:
        """Device blocks on their way out that a chunk of the same step may have."""
        return len(self._reusable)

    def pays(self, victim: Sequence) -> bool:
        """Whether its KV has room in host memory and comes back cheaper than computed."""
        count = self._pool.blocks_for(victim.num_computed)
        if not 0 < count <= self._host.num_free:
            return False
        shared = sum(self._pool.num_holders(b) > 1 for b in victim.block_table[: victim.num_named])
        num_tokens = victim.num_computed - shared * self._pool.block_size
        return swap_is_cheaper(num_tokens, count * self._block_bytes, self.rates)

    def out(self, victim: Sequence) -> None:
        """Plan the copies; the victim keeps ``num_computed`` and loses its blocks."""
        count = self._pool.blocks_for(victim.num_computed)
        blocks, unused = victim.block_table[:count], victim.block_table[count:]
        host = self._host.allocate(victim.seq_id, count)
        self._out += [BlockSwap(b, h) for b, h in zip(blocks, host, strict=True)]
        victim.host_blocks, victim.block_table = tuple(host), ()
        victim.num_named = 0
        owner = _owner(victim)
        self._pool.release(victim.seq_id, unused)
        self._pool.hand_over(victim.seq_id, owner, blocks)
        self._leaving.append(victim)
        self._leaving_blocks[owner] = list(blocks)
        self._reusable += [(owner, b) for b in blocks if self._pool.num_holders(b) == 1]
        self.num_swapped_out += 1

    def reuse(self, heir: str, count: int) -> list[int]:
        """Blocks whose contents this very step copies out before it writes to them."""
        taken = []
        for _ in range(count):
            owner, block = self._reusable.pop()
            self._leaving_blocks[owner].remove(block)
            self._pool.forget([block])
            self._pool.hand_over(owner, heir, [block])
            taken.append(block)
        return taken

    def back(self, sequence: Sequence, num_found: int) -> None:
        """Plan the copies into its new blocks, but for the first ``num_found``, which hold
        what they should. Its host blocks are free once the step is over."""
        count = len(sequence.host_blocks)
        blocks = sequence.block_table[num_found:count]
        host = sequence.host_blocks[num_found:]
        self._in += [BlockSwap(b, h) for b, h in zip(blocks, host, strict=True)]
        self._returning.append(sequence)

    def planned(self) -> tuple[tuple[BlockSwap, ...], tuple[BlockSwap, ...]]:
        """(out, in) for the step that is being put together."""
        out, self._out = tuple(self._out), []
        back, self._in = tuple(self._in), []
        return out, back

    def completed(self, plan: StepPlan, result: StepResult) -> None:
        self._meter.observe(plan, result)
        self._settle()

    def abandoned(self) -> None:
        """The step raised; whether its copies were made is unknown: recompute."""
        for sequence in self._leaving:
            if sequence.host_blocks:
                sequence.num_computed = sequence.complete_from = 0
                self.drop(sequence)
        self._settle()

    def _settle(self) -> None:
        for owner, blocks in self._leaving_blocks.items():
            self._pool.release(owner, blocks)
        for sequence in self._returning:
            self.drop(sequence)
        self._leaving, self._leaving_blocks, self._reusable = [], {}, []
        self._returning = []

    def drop(self, sequence: Sequence) -> None:
        """Give back its host blocks, if it has some."""
        self._host.release(sequence.seq_id, sequence.host_blocks)
        sequence.host_blocks = ()

    def check_integrity(self) -> list[str]:
        return [f"host memory: {problem}" for problem in self._host.check_integrity()]


def _owner(sequence: Sequence) -> str:
    return f"{sequence.seq_id}#swap"
