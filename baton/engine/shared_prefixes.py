"""Which decodes of a step begin with the same KV blocks, and are worth one pass over them. Pure.

They do where a prompt has several choices (``n``), and where the prefix cache found the same
beginning for several requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32] | npt.NDArray[np.int64]

MIN_ROWS = 4
"""Fewer rows read a prefix almost as fast each for itself: what one read, the device's cache
still holds for the next."""
MIN_SAVED_TOKENS = 16_384
"""Keys and values that a step must be spared, all groups together. With 8 KV heads of 128 numbers
in two bytes these are 64 MiB a layer, some 16 microseconds of an H200's memory, against one more
launch."""


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """rows: at least ``MIN_ROWS``. num_tokens: of their common prefix, below every row's length."""

    rows: tuple[int, ...]
    num_tokens: int

    @property
    def saved_tokens(self) -> int:
        return (len(self.rows) - 1) * self.num_tokens


def prefix_groups(
    tables: Ints, lengths: Ints, *, block_size: int, unit_tokens: int
) -> tuple[PrefixGroup, ...]:
    """Disjoint groups that together spare the most tokens; none where that is too little.

    tables: ``[B, M]`` block ids, whatever behind a row's blocks. lengths: ``[B]``, tokens of each
    row, the one that is being decoded included. Prefixes are multiples of ``unit_tokens``.
    A group is all rows that have so many tokens in common: rows are sorted by as much of their
    tables as could be shared, so that these are neighbours, and the best runs of neighbours that
    do not overlap are chosen.
    """
    order = _candidates(tables, lengths, unit_tokens)
    if len(order) < MIN_ROWS:
        return ()
    usable = -(-((lengths - 1) // unit_tokens * unit_tokens) // block_size)
    order.sort(key=lambda row: tables[row, : usable[row]].tobytes())
    common = _common_tokens(tables[order], lengths[order], block_size, unit_tokens)
    groups = [
        PrefixGroup(tuple(order[first:stop]), num_tokens)
        for first, stop, num_tokens in _best_runs(common)
    ]
    saved = sum(group.saved_tokens for group in groups)
    return tuple(groups) if saved >= MIN_SAVED_TOKENS else ()


def _candidates(tables: Ints, lengths: Ints, unit_tokens: int) -> list[int]:
    """Rows long enough, of whose first block there are enough. Most steps end here."""
    rows = np.flatnonzero(lengths > unit_tokens)
    _, which, counts = np.unique(tables[rows, 0], return_inverse=True, return_counts=True)
    found: list[int] = rows[counts[which] >= MIN_ROWS].tolist()
    return found


def _common_tokens(tables: Ints, lengths: Ints, block_size: int, unit_tokens: int) -> list[int]:
    """What each row has in common with the next one, in whole units."""
    differ = tables[1:] != tables[:-1]
    num_blocks = np.where(differ.any(axis=1), differ.argmax(axis=1), tables.shape[1])
    # The last token is each row's own: it is stored in this very step.
    shortest = np.minimum(lengths[1:], lengths[:-1]) - 1
    common: list[int] = (np.minimum(num_blocks * block_size, shortest) // unit_tokens).tolist()
    return [units * unit_tokens for units in common]


def _best_runs(common: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first row, row behind the last, tokens) of the runs that spare most and do not overlap."""
    num_rows = len(common) + 1
    saved = [0] * (num_rows + 1)
    chosen: list[tuple[int, int, int] | None] = [None] * (num_rows + 1)
    ends: dict[int, list[tuple[int, int]]] = {}
    for first, stop, num_tokens in _runs(common):
        ends.setdefault(stop, []).append((first, num_tokens))
    for stop in range(1, num_rows + 1):
        saved[stop] = saved[stop - 1]
        for first, num_tokens in ends.get(stop, ()):
            total = saved[first] + (stop - first - 1) * num_tokens
            if stop - first >= MIN_ROWS and total > saved[stop]:
                saved[stop], chosen[stop] = total, (first, stop, num_tokens)
    best = []
    stop = num_rows
    while stop > 0:
        run = chosen[stop]
        stop = stop - 1 if run is None else run[0]
        if run is not None:
            best.append(run)
    return best[::-1]


def _runs(common: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Every longest run of neighbours that have some number of tokens in common."""
    begun: list[tuple[int, int]] = []
    """(tokens, first row) of the runs that go on, in rising order of tokens."""
    for row, num_tokens in enumerate([*common, 0]):
        first = row
        while begun and begun[-1][0] > num_tokens:
            depth, first = begun.pop()
            yield first, row + 1, depth
        if num_tokens and (not begun or begun[-1][0] < num_tokens):
            begun.append((num_tokens, first))
