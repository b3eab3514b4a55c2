"""Which KV goes from which rank and block of one worker to which of another. Pure.

Both hold the same tokens of the same layers, but divide the KV heads among other numbers of
ranks and the tokens into other blocks. A rank's blocks are an array ``[blocks, block_size,
kv_heads, head_dim]`` per layer, for K and V each; a slot is one token's place in it:
``block * block_size + offset``.

It lies here because both ends need it: the engine, whose rank 0 gathers the others' heads, and
transports that write into the other side's blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from baton.protocol.errors import InternalError


@dataclass(frozen=True, slots=True)
class Placed:
    """How one worker holds a sequence. block_table: the same on all of its ranks."""

    num_ranks: int
    block_size: int
    block_table: Sequence[int]


@dataclass(frozen=True, slots=True)
class Copy:
    """``num_tokens`` slots that follow each other, ``num_heads`` heads of each.

    Heads are counted within the rank. A run may go on into the next block where that follows in
    memory, too.
    """

    source_rank: int
    source_block: int
    source_offset: int
    source_head: int
    target_rank: int
    target_block: int
    target_offset: int
    target_head: int
    num_tokens: int
    num_heads: int


def heads_of(rank: int, num_ranks: int, num_heads: int) -> range:
    """Of the whole model's KV heads, those of one rank: an equal share, or with more ranks than
    heads one that some neighbours have as well.

    Raises InternalError where neither number divides the other.
    """
    if num_heads % num_ranks == 0:
        share = num_heads // num_ranks
        return range(rank * share, (rank + 1) * share)
    if num_ranks % num_heads == 0:
        head = rank // (num_ranks // num_heads)
        return range(head, head + 1)
    raise InternalError(f"{num_heads} KV heads cannot be divided among {num_ranks} ranks")


def plan_copies(num_heads: int, source: Placed, target: Placed, tokens: range) -> list[Copy]:
    """What takes the positions ``tokens`` of one layer from ``source`` to ``target``.

    Every rank of the target gets each element of its heads once. A head that several ranks of the
    source hold is read from the first of them. There are as few copies as there are pairs of
    ranks with heads in common, times runs of slots that follow each other on both sides.
    num_heads: of the layer, over all ranks.

    Raises InternalError when a block table does not cover ``tokens``.
    """
    runs = list(_runs(source, target, tokens))
    return [
        Copy(
            source_rank,
            slots[0] // source.block_size,
            slots[0] % source.block_size,
            source_head,
            target_rank,
            slots[1] // target.block_size,
            slots[1] % target.block_size,
            target_head,
            num_tokens,
            count,
        )
        for source_rank, source_head, target_rank, target_head, count in _head_pairs(
            num_heads, source.num_ranks, target.num_ranks
        )
        for slots, num_tokens in runs
    ]


def _head_pairs(
    num_heads: int, num_source: int, num_target: int
) -> Iterator[tuple[int, int, int, int, int]]:
    """(source rank, head in it, target rank, head in it, number of heads)."""
    for target_rank in range(num_target):
        wanted = heads_of(target_rank, num_target, num_heads)
        head = wanted.start
        while head < wanted.stop:
            source_rank = _first_with(head, num_source, num_heads)
            there = heads_of(source_rank, num_source, num_heads)
            stop = min(wanted.stop, there.stop)
            yield (
                source_rank,
                head - there.start,
                target_rank,
                head - wanted.start,
                stop - head,
            )
            head = stop


def _first_with(head: int, num_ranks: int, num_heads: int) -> int:
    """The first rank that holds ``head``."""
    return head * num_ranks // num_heads


def _runs(source: Placed, target: Placed, tokens: range) -> Iterator[tuple[tuple[int, int], int]]:
    """((source slot, target slot), number of tokens), as long as can be."""
    if not 0 <= tokens.start <= tokens.stop or tokens.step != 1:
        raise InternalError(f"positions {tokens} of a sequence")
    for side in (source, target):
        if tokens.stop > len(side.block_table) * side.block_size:
            raise InternalError(
                f"positions {tokens.start} to {tokens.stop - 1} asked of {len(side.block_table)} "
                f"blocks of {side.block_size}"
            )
    begun: tuple[int, int] | None = None
    length, position = 0, tokens.start
    while position < tokens.stop:
        slots = (_slot(source, position), _slot(target, position))
        count = min(
            tokens.stop - position,
            source.block_size - position % source.block_size,
            target.block_size - position % target.block_size,
        )
        if begun is not None and slots == (begun[0] + length, begun[1] + length):
            length += count
        else:
            if begun is not None:
                yield begun, length
            begun, length = slots, count
        position += count
    if begun is not None:
        yield begun, length


def _slot(side: Placed, position: int) -> int:
    number, offset = divmod(position, side.block_size)
    return side.block_table[number] * side.block_size + offset
