"""Which part of a model one rank has. Pure data: the config checks ask here too, without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shard:
    """Part ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1


WHOLE = Shard()
