"""Damage to a frame is found: every one of 10,000."""

from __future__ import annotations

import random

import msgspec
import pytest

from kv_transfer.codecs.checksum import checksum, checksum_of
from kv_transfer.codecs.contract import CodecError
from kv_transfer.codecs.registry import make
from tests.support.kv_samples import PART, Geometry, kv_like

GEOMETRY = Geometry("bfloat16", 2, 16)


def flipped(data: bytes, rng: random.Random) -> bytes:
    """One bit, a few anywhere, or a burst within four bytes."""
    damaged = bytearray(data)
    kind = rng.randrange(3)
    if kind == 0:
        places = {rng.randrange(8 * len(data))}
    elif kind == 1:
        places = {rng.randrange(8 * len(data)) for _ in range(rng.randint(2, 16))}
    else:
        begin = rng.randrange(8 * len(data) - 32)
        places = {begin + rng.randrange(32) for _ in range(rng.randint(2, 32))}
    for place in places:
        damaged[place // 8] ^= 1 << place % 8
    return bytes(damaged)


def test_parts_are_one_after_the_other():
    assert checksum([b"he", b"", bytearray(b"ader"), memoryview(b"payload")]) == checksum_of(
        b"headerpayload"
    )
    assert checksum([]) == checksum_of(b"")
    assert checksum([b"x"], seed=1) != checksum([b"x"])
    assert 0 <= checksum([b"header"]) < 2**64


def test_of_10000_damaged_frames_none_is_accepted():
    """As a frame goes over a link: a header that holds the checksum of its fields and of the
    payload, then the payload. Damage may hit fields, checksum or payload."""
    rng = random.Random(5)
    payload = bytes(make("split", GEOMETRY).encode(kv_like(GEOMETRY, 2, 24), PART))
    fields = msgspec.msgpack.encode(["r/0", 3, 0, 2, 0, 24, "split", len(payload)])
    frame = checksum([fields, payload]).to_bytes(8, "little") + fields + payload
    num_accepted = 0
    for _ in range(10_000):
        damaged = flipped(frame, rng)
        assert damaged != frame
        said = int.from_bytes(damaged[:8], "little")
        body = memoryview(damaged)[8:]
        num_accepted += said == checksum([body[: len(fields)], body[len(fields) :]])
    assert num_accepted == 0


@pytest.mark.parametrize("name", ["raw", "split", "entropy", "int8", "fp8", "int4"])
def test_damage_to_a_stream_alone_is_found_too(name):
    """Streams may be kept without a frame around them."""
    rng = random.Random(7)
    codec, kv = make(name, GEOMETRY), kv_like(GEOMETRY, 2, 40)
    stream = bytes(codec.encode(kv, PART))
    out = kv.copy()
    for _ in range(1_700):
        with pytest.raises(CodecError):
            codec.decode(flipped(stream, rng), PART, out)
    codec.decode(stream, PART, out)
