"""The one checksum of KV bytes: XXH3, 64 bits. Finds damage; says nothing of who sent it."""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

from kv_transfer.codecs.contract import Bytes

CHECKSUM_BYTES = 8


def checksum(parts: Iterable[Bytes], seed: int = 0) -> int:
    """Of the parts one after the other: where one ends and the next begins does not count, so
    lengths belong among them (the frame header has them). 0 <= result < 2**64.

    parts: C-contiguous bytes of any alignment; read in place, tens of GB/s.
    """
    state = xxhash.xxh3_64(seed=seed)
    for part in parts:
        state.update(part)
    return state.intdigest()


def checksum_of(part: Bytes, seed: int = 0) -> int:
    """``checksum([part], seed)``, in one call."""
    return xxhash.xxh3_64_intdigest(part, seed=seed)
