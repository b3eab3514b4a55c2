"""Quality floors: which codecs a request allows, and what its KV is worth to others after. Pure.

``exact``: the bits that prefill computed. ``lossless``: those, or computed again from the
tokens. ``high``, ``medium``, ``low``: lossy codecs too, down to that quality.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from baton.protocol.block_hash import EXACT
from kv_transfer.codecs.contract import Quality


def floor_of(asked: str, default: str) -> Quality:
    """asked: by the request; "" leaves it to ``default``, the cluster's. An unknown one (of a
    newer release) gets the best, as from ``classes_for``."""
    return Quality.__members__.get((asked or default).upper(), Quality.EXACT)


def allowed(codecs: Mapping[str, Quality], floor: Quality) -> tuple[str, ...]:
    """In their order. ``exact`` and ``lossless`` allow the same codecs."""
    return tuple(name for name, quality in codecs.items() if quality >= min(floor, Quality.EXACT))


def may_recompute(floor: Quality, *, is_deterministic: bool) -> bool:
    """Other kernels or other batches round otherwise: the same bits only where that is ruled
    out."""
    return floor < Quality.EXACT or is_deterministic


def quality_class(qualities: Iterable[Quality]) -> str:
    """Of KV whose parts came through codecs of these qualities: the lowest, in the words of
    ``root_key``. Blocks are found by requests whose floor is not above it."""
    lowest = min(qualities, default=Quality.EXACT)
    return EXACT if lowest >= Quality.LOSSLESS else lowest.name.lower()
