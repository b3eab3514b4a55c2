"""Names of KV blocks by content: what a block's rows are made of, and all tokens before it.

Part of the protocol, so that whoever asks for a prefix and whoever has it agree. Chained
BLAKE2b cut to 128 bits: a crafted prompt must not meet another's key, and a key must not
depend on the process that computed it (Python's ``hash`` does both).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import NewType

BlockKey = NewType("BlockKey", bytes)

KEY_BYTES = 16
EXACT = "exact"
"""The quality class of KV that was computed, or moved byte for byte."""
LOSSY_CLASSES = ("high", "medium", "low")
"""Of KV of which some came through a lossy codec, or was computed looking back at such KV."""
KV_FLOORS = (EXACT, "lossless", *LOSSY_CLASSES)
"""What requests ask for, the best first. "lossless" is as exact to whoever looks a prefix up."""


@lru_cache(maxsize=1_024)
def root_key(tenant: str = "", quality: str = EXACT) -> BlockKey:
    """The parent of a sequence's first block: who may share it, and how good its KV is."""
    assert "\0" not in quality
    salt = f"{quality}\0{tenant}".encode()
    return BlockKey(blake2b(salt, digest_size=KEY_BYTES, person=b"baton kv root").digest())


@lru_cache(maxsize=16)
def classes_for(floor: str) -> tuple[str, ...]:
    """Quality classes that may serve a request of that floor, the best first. "" or an unknown
    one (of a newer release) is served the best alone."""
    lossy = LOSSY_CLASSES[: LOSSY_CLASSES.index(floor) + 1] if floor in LOSSY_CLASSES else ()
    return (EXACT, *lossy)


def worst_class(one: str, other: str) -> str:
    classes = (EXACT, *LOSSY_CLASSES)
    return max(one, other, key=classes.index)


_BLOCK = blake2b(digest_size=KEY_BYTES, person=b"baton kv")


@lru_cache(maxsize=16)
def _layout(num_tokens: int) -> struct.Struct:
    return struct.Struct(f"<{KEY_BYTES}s{num_tokens}I")


def block_key(parent: BlockKey, token_ids: Sequence[int]) -> BlockKey:
    """The key of a full block of ``token_ids`` behind the block (or root) named ``parent``."""
    # A scheduler names some hundred blocks a step: parsing nothing anew halves what that takes.
    block = _BLOCK.copy()
    block.update(_layout(len(token_ids)).pack(parent, *token_ids))
    return BlockKey(block.digest())
