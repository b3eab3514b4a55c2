"""Which blocks of a new sequence another one has computed, or is just computing. Pure.

Sequences share full blocks, found by chained keys (``baton.protocol.block_hash``), of the quality
classes that each accepts: KV that came through a lossy codec serves no higher floor. A block is
published when a step that computed its last row is over, or when all its rows came from
elsewhere: where layers slide, the older blocks of a prompt come without some. What an admitted
sequence is still to compute is announced, so that one that begins alike can wait for it instead
of computing the same again.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.engine.block_pool import BlockPool
from baton.engine.sequence import Sequence
from baton.protocol.block_hash import EXACT, BlockKey, worst_class


@dataclass(frozen=True, slots=True)
class Found:
    """blocks: cover the sequence's first tokens; nobody has taken them yet.
    quality: their class. awaited: the key of the last block in a row that a more urgent sequence
    computes."""

    blocks: tuple[int, ...] = ()
    awaited: BlockKey | None = None
    quality: str = EXACT


NOTHING = Found()


class PrefixCache:
    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._computing: dict[BlockKey, Sequence] = {}
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0

    def find(self, sequence: Sequence) -> Found:
        """At least one token is left to compute: its row is what draws the next token."""
        if sequence.prompt_logprobs is not None:
            return NOTHING
        best = NOTHING
        for quality in sequence.accepts:
            found = self._find(sequence, quality)
            if (len(found.blocks), found.awaited is not None) > (
                len(best.blocks),
                best.awaited is not None,
            ):
                best = found
        return best

    def _find(self, sequence: Sequence, quality: str) -> Found:
        size, pool = self._pool.block_size, self._pool
        count = (sequence.num_tokens - 1) // size
        keys = sequence.keys(count, size, quality)
        blocks: list[int] = []
        for number in range(count):
            block = pool.find(keys[number])
            if block is None:
                break
            blocks.append(block)
        awaited = None
        for number in range(len(blocks), count):
            computing = self._computing.get(keys[number])
            # Of two, the more urgent has the budget first: waiting for it costs no step.
            if computing is None or computing.urgency >= sequence.urgency:
                break
            awaited = keys[number]
        return Found(tuple(blocks), awaited, quality)

    def admitted(self, sequence: Sequence, found: Found) -> None:
        """Count its hits and announce the full blocks that it is about to compute. What looks back
        at lossy KV is no better than that."""
        size = self._pool.block_size
        if found.blocks:
            sequence.quality = worst_class(sequence.quality, found.quality)
        if sequence.prompt_logprobs is None:
            self.num_queried_tokens += sequence.num_tokens
            self.num_hit_tokens += sequence.num_cached
        count = sequence.num_tokens // size
        for key in sequence.keys(count, size)[sequence.num_named : count]:
            self._computing.setdefault(key, sequence)

    def computed(self, sequence: Sequence, num_computed: int) -> list[BlockKey]:
        """Publish what has become full; the keys whose waiters may look again."""
        size = self._pool.block_size
        count = num_computed // size
        keys = sequence.keys(count, size)
        settled = []
        for number in range(sequence.num_named, count):
            if number * size >= sequence.complete_from:
                self._pool.publish(sequence.block_table[number], keys[number])
            if self._computing.get(keys[number]) is sequence:
                del self._computing[keys[number]]
                settled.append(keys[number])
        sequence.num_named = max(sequence.num_named, count)
        return settled

    def received(self, sequence: Sequence) -> None:
        """Publish blocks that came filled from elsewhere, but for those that lack rows. Those that
        are here already are shared instead, and the copies go back."""
        size, pool = self._pool.block_size, self._pool
        count = sequence.num_computed // size
        table = list(sequence.block_table)
        for number, key in enumerate(sequence.keys(count, size)[:count]):
            known = pool.find(key)
            if known is None:
                if number * size >= sequence.complete_from:
                    pool.publish(table[number], key)
            elif known != table[number]:
                pool.share(sequence.seq_id, [known])
                pool.release(sequence.seq_id, [table[number]])
                table[number] = known
        sequence.block_table = tuple(table)
        sequence.num_named = count

    def left(self, sequence: Sequence) -> list[BlockKey]:
        """It computes no further: take back what it announced, and say so."""
        settled = []
        size = self._pool.block_size
        count = sequence.num_tokens // size
        for key in sequence.keys(sequence.num_named, size)[sequence.num_named : count]:
            if self._computing.get(key) is sequence:
                del self._computing[key]
                settled.append(key)
        return settled

    def check_integrity(self, running: set[str], awaited: list[BlockKey]) -> list[str]:
        lost = {s.seq_id for s in self._computing.values()} - running
        problems = [f"{seq_id} is said to compute, but does not run" for seq_id in sorted(lost)]
        if any(key not in self._computing for key in awaited):
            problems.append("a waiting sequence waits for what nobody computes")
        return problems
