"""The stream around sections: what it says of itself, and what it refuses."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from kv_transfer.codecs.container import (
    Form,
    StreamHeader,
    StreamWriter,
    max_stream_bytes,
    read_header,
    read_sections,
)
from kv_transfer.codecs.contract import CodecError
from tests.support.kv_samples import sealed

HEADER = StreamHeader("split", "bfloat16", 2, 5, 2, 4, b"profile!")


def test_what_is_written_is_read():
    stream = sealed(HEADER, [b"abcde", b"xy"])
    assert read_header(stream) == HEADER
    sections = read_sections(stream, HEADER)
    assert [(s.form, bytes(s.data)) for s in sections] == [
        (Form.CODED, b"abcde"),
        (Form.CODED, b"xy"),
    ]
    assert len(stream) == 32 + 2 * 12 + 8 + 4


def test_the_layout_of_bytes_is_the_documented_one():
    stream = sealed(HEADER, [b"abcde", b""])
    assert stream[:32] == b"BKVS\x01\x01\x02\x00\x05\x00\x00\x00\x02\x00\x04\x00split\0\0\0profile!"
    assert struct.unpack_from("<I", stream, 32) == (5,)
    assert struct.unpack_from("<I", stream, 44) == (0,)
    assert stream[56:] == b"abcde\0\0\0"


def test_raw_sections_hold_the_layer():
    layer = np.arange(80, dtype=np.uint16).reshape(2, 5, 2, 4)
    writer = StreamWriter(HEADER)
    writer.commit_raw(layer)
    writer.commit_raw(layer + 1)
    stream = writer.finish()
    assert len(stream) <= max_stream_bytes(2, HEADER.layer_bytes)
    first, second = read_sections(stream, HEADER)
    assert first.form == second.form == Form.RAW
    assert bytes(first.data) == layer.tobytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"codec": "raw"}, "codec 'split', expected 'raw'"),
        ({"dtype": "float16"}, "dtype 'bfloat16', expected 'float16'"),
        ({"num_tokens": 6}, "num_tokens 5, expected 6"),
        ({"num_layers": 1}, "num_layers 2, expected 1"),
        ({"profile": bytes(8)}, "profile b'profile!'"),
    ],
)
def test_another_stream_than_expected_is_refused_by_name(change, said):
    stream = sealed(HEADER, [b"a", b"b"])
    fields = {name: getattr(HEADER, name) for name in HEADER.__dataclass_fields__}
    with pytest.raises(CodecError, match=said.replace("(", r"\(")):
        read_sections(stream, StreamHeader(**(fields | change)))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda s: s[:20], "a header has 32"),
        (lambda s: s[:50], "ends in its section table"),
        (lambda s: s[:-4], "section 1 of a KV stream claims 4 bytes"),
        (lambda s: s + b"\0\0\0\0", "4 bytes behind"),
        (lambda s: b"BKVT" + s[4:], "begins with"),
        (lambda s: s[:4] + b"\x02" + s[5:], "format 2"),
        (lambda s: s[:5] + b"\x07" + s[6:], "dtype 7"),
        (lambda s: s[:16] + b"sp/it\0\0\0" + s[24:], "no name of a codec"),
        (lambda s: s[:32] + b"\x06" + s[33:], "does not match its checksum"),
        (lambda s: s[:32] + b"\xff\xff\xff\x3f" + s[36:], "claims 1073741823 bytes"),
        (lambda s: s[:32] + b"\x05\0\0\x80" + s[36:], "has form 2"),
        (lambda s: s[:32] + b"\x05\0\0\x40" + s[36:], "has 5 raw bytes"),
        (lambda s: s[:61] + b"\x01" + s[62:], "wrong padding"),
    ],
)
def test_damage_is_told_by_what_it_hit(damage, said):
    stream = damage(sealed(HEADER, [b"abcde", b"xyz!"]))
    with pytest.raises(CodecError, match=said):
        read_sections(stream, HEADER)


def test_sections_do_not_change_places():
    """Two layers of equal length and content: a checksum belongs to its place."""
    stream = bytearray(sealed(HEADER, [b"abcd", b"efgh"]))
    stream[32:44], stream[44:56] = stream[44:56], stream[32:44]
    stream[56:60], stream[60:64] = stream[60:64], stream[56:60]
    with pytest.raises(CodecError, match="section 0"):
        read_sections(stream, HEADER)
