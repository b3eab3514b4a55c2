"""Keys are part of the protocol: another version, or another program, makes the same."""

from __future__ import annotations

import struct
from hashlib import blake2b

from baton.protocol.block_hash import block_key, classes_for, root_key, worst_class


def test_keys_are_chained_blake2b_of_little_endian_ids() -> None:
    root = root_key("tenant")
    assert (
        root.hex() == blake2b(b"exact\0tenant", digest_size=16, person=b"baton kv root").hexdigest()
    )
    first = block_key(root, (1, 2, 2**32 - 1, 0))
    packed = struct.pack("<4I", 1, 2, 2**32 - 1, 0)
    assert first == blake2b(root + packed, digest_size=16, person=b"baton kv").digest()
    second = block_key(first, [5] * 16)
    packed = struct.pack("<16I", *[5] * 16)
    assert second == blake2b(first + packed, digest_size=16, person=b"baton kv").digest()


def test_what_differs_has_another_key() -> None:
    ids = (1, 2, 3, 4)
    keys = [
        block_key(root_key(), ids),
        block_key(root_key("a"), ids),
        block_key(root_key(quality="low"), ids),
        block_key(block_key(root_key(), ids), ids),
        block_key(root_key(), (1, 2, 3)),
        block_key(root_key(), (1, 2, 4, 3)),
    ]
    assert len(set(keys)) == len(keys)


def test_each_floor_is_served_by_what_is_at_least_as_good() -> None:
    assert classes_for("exact") == classes_for("lossless") == ("exact",)
    assert classes_for("high") == ("exact", "high")
    assert classes_for("medium") == ("exact", "high", "medium")
    assert classes_for("low") == ("exact", "high", "medium", "low")
    assert classes_for("") == classes_for("of a newer release") == ("exact",)


def test_kv_is_as_good_as_the_worst_of_it() -> None:
    assert worst_class("exact", "exact") == "exact"
    assert worst_class("medium", "high") == worst_class("exact", "medium") == "medium"
