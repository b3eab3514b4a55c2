"""The form of every coded stream: a header, a table of sections, one section per layer.

    bytes       what
    4           magic b"BKVS"
    1           format version
    1           dtype: 1 bfloat16, 2 float16, 3 float32
    2           layers
    4           tokens
    2, 2        kv_heads, head_dim
    8           codec name, ASCII, padded with zero bytes
    8           digest of the codec profile; zero where the codec needs none
    12 * layers section table: length and form (4), checksum (8)
    ...         the sections, in order of layers, each padded to a multiple of 4 bytes

Numbers are little-endian. A length has its section's form in the top two bits: coded, or the raw
bytes of the layer. Checksums are XXH3 of the section's bytes, seeded with the XXH3 of the header
and the place in the table, so damage anywhere is found by some section's checksum.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from kv_transfer.codecs.checksum import checksum_of
from kv_transfer.codecs.contract import (
    Array,
    Bytes,
    CodecError,
    KvGeometry,
    array_dtype,
    num_elements,
)

MAGIC = b"BKVS"
FORMAT_VERSION = 1
NO_PROFILE = bytes(8)
NAME_BYTES = 8
DTYPE_CODES = {"bfloat16": 1, "float16": 2, "float32": 3}
_DTYPES = {code: name for name, code in DTYPE_CODES.items()}
_HEADER = struct.Struct(f"<4sBBHIHH{NAME_BYTES}s8s")
_ENTRY = struct.Struct("<IQ")
_FORM_SHIFT = 30
_LENGTH_MASK = (1 << _FORM_SHIFT) - 1
_PADDING = 4
MAX_SECTION_BYTES = _LENGTH_MASK


class Form(IntEnum):
    """RAW: the layer's bytes as they are in the array. CODED: the codec's own."""

    CODED = 0
    RAW = 1


@dataclass(frozen=True, slots=True)
class StreamHeader:
    codec: str
    dtype: str
    num_layers: int
    num_tokens: int
    num_kv_heads: int
    head_dim: int
    profile: bytes = NO_PROFILE

    @property
    def layer_bytes(self) -> int:
        """Raw, K and V."""
        size = array_dtype(self.dtype).itemsize
        return 2 * self.num_tokens * self.num_kv_heads * self.head_dim * size


@dataclass(frozen=True, slots=True)
class Section:
    """One layer's bytes, checked against the checksum; a view into the stream."""

    form: Form
    data: memoryview


def header_for(
    codec: str, geometry: KvGeometry, kv: Array, profile: bytes = NO_PROFILE
) -> StreamHeader:
    """Of a stream that holds ``kv``. An array of another model's shape is our bug."""
    assert kv.dtype == array_dtype(geometry.dtype), (kv.dtype, geometry.dtype)
    assert kv.flags.c_contiguous
    return header_of_shape(codec, geometry, kv.shape, profile)


def header_of_shape(
    codec: str, geometry: KvGeometry, shape: Sequence[int], profile: bytes = NO_PROFILE
) -> StreamHeader:
    num_layers, two, num_tokens, num_kv_heads, head_dim = shape
    assert two == 2, shape
    assert (num_kv_heads, head_dim) == (geometry.num_kv_heads, geometry.head_dim), shape
    assert num_elements(shape) > 0, shape
    assert 0 < num_layers < 1 << 16, shape
    header = StreamHeader(
        codec, geometry.dtype, num_layers, num_tokens, num_kv_heads, head_dim, profile
    )
    assert header.layer_bytes <= MAX_SECTION_BYTES, shape
    return header


def max_stream_bytes(num_layers: int, layer_bytes: int) -> int:
    """The longest stream of any codec for that many layers of ``layer_bytes`` raw."""
    return _HEADER.size + num_layers * (_ENTRY.size + layer_bytes + _PADDING - 1)


class StreamWriter:
    """Builds one stream in place: ``room``, write into it, ``commit``; once per layer.

    A section may use scratch room beyond ``layer_bytes``; what is committed may not.
    """

    def __init__(self, header: StreamHeader, scratch_bytes: int = 0) -> None:
        self._header = header
        self._packed = _pack_header(header)
        self._seed = checksum_of(self._packed)
        self._num_done = 0
        self._end = len(self._packed) + header.num_layers * _ENTRY.size
        capacity = max_stream_bytes(header.num_layers, header.layer_bytes) + scratch_bytes
        self._buffer = np.empty(capacity, np.uint8)
        self._buffer[: len(self._packed)] = np.frombuffer(self._packed, np.uint8)

    def room(self) -> NDArray[np.uint8]:
        """Where the next section's bytes go: at least ``layer_bytes`` and the scratch bytes,
        aligned to 4 bytes."""
        return self._buffer[self._end :]

    def commit(self, num_bytes: int, form: Form = Form.CODED) -> None:
        """The next section is the first ``num_bytes`` of ``room()``."""
        assert 0 <= num_bytes <= self._header.layer_bytes, num_bytes
        place = len(self._packed) + self._num_done * _ENTRY.size
        word = num_bytes | form << _FORM_SHIFT
        data = self._buffer.data[self._end : self._end + num_bytes]
        check = checksum_of(data, _seed(self._seed, self._num_done, word))
        _ENTRY.pack_into(self._buffer.data, place, word, check)
        end = self._end + num_bytes
        self._end = -(-end // _PADDING) * _PADDING
        self._buffer[end : self._end] = 0
        self._num_done += 1

    def commit_raw(self, layer: Array) -> None:
        """The next section is the layer's own bytes."""
        raw = layer.reshape(-1).view(np.uint8)
        self.room()[: raw.size] = raw
        self.commit(raw.size, Form.RAW)

    def finish(self) -> memoryview:
        assert self._num_done == self._header.num_layers, self._num_done
        return self._buffer.data[: self._end]


def read_header(stream: Bytes) -> StreamHeader:
    """What a stream says of itself. Raises CodecError; allocates nothing by what it says."""
    if len(stream) < _HEADER.size:
        raise CodecError(f"KV stream of {len(stream)} bytes, a header has {_HEADER.size}")
    magic, version, dtype, layers, tokens, heads, dim, name, profile = _HEADER.unpack_from(stream)
    if magic != MAGIC:
        raise CodecError(f"KV stream begins with {magic!r}, expected {MAGIC!r}")
    if version != FORMAT_VERSION:
        raise CodecError(f"KV stream of format {version}, expected {FORMAT_VERSION}")
    if dtype not in _DTYPES:
        raise CodecError(f"KV stream of dtype {dtype}, known are {sorted(_DTYPES)}")
    codec = name.rstrip(b"\0")
    if not codec.isalnum() or not codec.isascii():
        raise CodecError(f"KV stream of codec {codec!r}: no name of a codec")
    return StreamHeader(codec.decode(), _DTYPES[dtype], layers, tokens, heads, dim, profile)


def read_sections(stream: Bytes, expected: StreamHeader) -> list[Section]:
    """The sections of a stream that is exactly what ``expected`` says. Raises CodecError.

    Every length is at most the raw size of a layer, together they make up the stream, and every
    checksum holds.
    """
    # Read-only whatever came in: kernels are compiled once for each kind of array.
    view = memoryview(stream).cast("B").toreadonly()
    found = read_header(view)
    if found != expected:
        raise CodecError(f"KV stream says {_difference(found, expected)}")
    table_end = _HEADER.size + expected.num_layers * _ENTRY.size
    if len(view) < table_end:
        raise CodecError(f"KV stream of {len(view)} bytes ends in its section table")
    seed = checksum_of(view[: _HEADER.size])
    sections, begin = [], table_end
    for index in range(expected.num_layers):
        word, check = _ENTRY.unpack_from(view, _HEADER.size + index * _ENTRY.size)
        length, form = word & _LENGTH_MASK, word >> _FORM_SHIFT
        end = begin + length
        if form > Form.RAW:
            raise CodecError(f"section {index} of a KV stream has form {form}")
        if length > expected.layer_bytes or end > len(view):
            raise CodecError(f"section {index} of a KV stream claims {length} bytes")
        if form == Form.RAW and length != expected.layer_bytes:
            raise CodecError(f"section {index} of a KV stream has {length} raw bytes")
        if checksum_of(view[begin:end], _seed(seed, index, word)) != check:
            raise CodecError(f"section {index} of a KV stream does not match its checksum")
        sections.append(Section(Form(form), view[begin:end]))
        begin = -(-end // _PADDING) * _PADDING
        if begin > len(view) or any(view[end:begin]):
            raise CodecError(f"section {index} of a KV stream has wrong padding")
    if begin != len(view):
        raise CodecError(f"KV stream has {len(view) - begin} bytes behind its last section")
    return sections


def read_raw(section: Section, layer: Array) -> None:
    """The layer of a section whose form is RAW."""
    layer.reshape(-1).view(np.uint8)[:] = np.frombuffer(section.data, np.uint8)


def _pack_header(header: StreamHeader) -> bytes:
    name = header.codec.encode("ascii")
    assert 0 < len(name) <= NAME_BYTES, name
    assert len(header.profile) == len(NO_PROFILE), header.profile
    return _HEADER.pack(
        MAGIC,
        FORMAT_VERSION,
        DTYPE_CODES[header.dtype],
        header.num_layers,
        header.num_tokens,
        header.num_kv_heads,
        header.head_dim,
        name,
        header.profile,
    )


def _seed(header_seed: int, index: int, word: int) -> int:
    return header_seed ^ (index << 32 | word)


def _difference(found: StreamHeader, expected: StreamHeader) -> str:
    names = StreamHeader.__dataclass_fields__
    pairs = ((name, getattr(found, name), getattr(expected, name)) for name in names)
    return ", ".join(f"{n} {f!r}, expected {e!r}" for n, f, e in pairs if f != e)
