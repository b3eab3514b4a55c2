"""Which of several runs of rows, packed one after the other, a tile belongs to."""

from __future__ import annotations

from typing import Any

from baton.engine.kernels.jit import jit, tl


@jit
def find_segment(
    starts_ptr: tl.tensor, num_segments: tl.tensor, tile: tl.tensor, ROWS: tl.constexpr
) -> Any:
    """The last segment s with ``starts[s] // ROWS + s <= tile``, by bisection.

    Segment s is given the tiles from ``starts[s] // ROWS + s`` up to the next segment's first.
    These are enough: ``floor((start + n) / ROWS) - floor(start / ROWS) + 1 >= ceil(n / ROWS)``,
    and all segments together have ``starts[-1] // ROWS + num_segments`` of them, a number known
    without reading ``starts`` back from the device. A tile past its segment's end has no rows.
    """
    low = 0
    high = num_segments
    while high - low > 1:
        middle = (low + high) // 2
        fits = tl.load(starts_ptr + middle) // ROWS + middle <= tile
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)
    return low
