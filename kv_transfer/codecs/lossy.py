"""The lossy codecs ``kv1`` (finest) to ``kv4``: a model's own profile, static tables, rANS.

A section (one layer):

    4, 4        number of escapes, number of raw rows
    4 * rows    raw rows' numbers, ascending (see ``lossy_reference.quantise``)
    rows        their channels' own bytes
    2 * escapes quotients beyond their table's limit, in the order of symbols
    ...         rANS of all symbols (``rans``), ``lanes_for(symbols)`` lanes

A row goes raw where the profile's grid does not reach: outliers, NaN, infinity.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_transfer.codecs import lossy_compiled, lossy_reference, rans_compiled
from kv_transfer.codecs.container import (
    Form,
    Section,
    StreamWriter,
    header_for,
    read_raw,
    read_sections,
)
from kv_transfer.codecs.contract import (
    Array,
    Bytes,
    CodecError,
    Implementation,
    KvGeometry,
    KvPart,
    Quality,
)
from kv_transfer.codecs.float_values import narrow, narrow_reference, widen, widen_reference
from kv_transfer.codecs.lossy_profile import MAX_QUOTIENT, Profile
from kv_transfer.codecs.lossy_tables import (
    LayerTables,
    LevelTables,
    Segments,
    Turns,
    layers_of,
    level_tables,
    segments,
    symbol_tables,
)
from kv_transfer.codecs.rans import U8, decode_reference, encode_reference, lanes_for

I16 = NDArray[np.int16]
COUNTS = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class LossySection:
    """A section's parts. escapes: quotients. numbers, rows: of the rows that it carries as they
    are, ``[n]`` and ``[n, C]``. coded: rANS of the symbols."""

    escapes: I16
    numbers: NDArray[np.uint32]
    rows: Array
    coded: U8


class LossyCodec:
    """See ``contract.Codec``. Raises ConfigError for a profile of another model's shape."""

    def __init__(
        self,
        geometry: KvGeometry,
        profile: Profile,
        name: str,
        implementation: Implementation = "compiled",
    ) -> None:
        place = profile.level(name)
        profile.check_shape(geometry)
        self._geometry = geometry
        self._digest = profile.digest()
        self._name = name
        self._quality = profile.levels[place].quality
        self._level: LevelTables = level_tables(profile, place)
        self._turns = Turns()
        self._is_compiled = implementation == "compiled"

    @property
    def name(self) -> str:
        return self._name

    @property
    def quality(self) -> Quality:
        return self._quality

    def encode(self, kv: Array, part: KvPart) -> Bytes:
        writer = StreamWriter(header_for(self._name, self._geometry, kv, self._digest))
        runs = segments(self._level.ages, part, kv.shape[2])
        for place, layer in enumerate(layers_of(self._level, part, len(kv))):
            coded = self._encode_layer(kv[place], layer, part, runs)
            size = sum(len(piece) for piece in coded)
            if size >= kv[place].nbytes:
                writer.commit_raw(kv[place])
                continue
            at, room = 0, writer.room()
            for piece in coded:
                room[at : at + len(piece)] = piece
                at += len(piece)
            writer.commit(size)
        return writer.finish()

    def decode(self, stream: Bytes, part: KvPart, out: Array) -> None:
        expected = header_for(self._name, self._geometry, out, self._digest)
        runs = segments(self._level.ages, part, out.shape[2])
        layers = layers_of(self._level, part, len(out))
        for section, layer, target in zip(
            read_sections(stream, expected), layers, out, strict=True
        ):
            if section.form == Form.RAW:
                read_raw(section, target)
            else:
                self._decode_layer(section, layer, part, runs, target)

    def _encode_layer(
        self, kv: Array, layer: LayerTables, part: KvPart, runs: Segments
    ) -> list[U8]:
        cos, sin = self._turns.of(layer, part, kv.shape[1])
        index = symbol_tables(layer, runs)
        lanes = lanes_for(index.size)
        head_dim, level = self._geometry.head_dim, self._level
        if self._is_compiled:
            is_narrow = self._geometry.dtype == "bfloat16"
            bits = kv if is_narrow else widen(kv, self._geometry.dtype).view(np.uint32)
            found = lossy_compiled.quantise(
                bits, head_dim, cos, sin, layer, level, runs, index.size
            )
            encode: Callable[..., U8] = rans_compiled.encode
        else:
            x = widen_reference(kv, self._geometry.dtype)
            found = lossy_reference.quantise(x, head_dim, cos, sin, layer, level, runs)
            encode = encode_reference
        symbols, escapes, raw_rows = found
        rows = _take_rows(raw_rows, layer, kv)
        coded = encode(symbols, index, level.rans, lanes) if index.size else np.empty(0, np.uint8)
        counts = np.frombuffer(COUNTS.pack(escapes.size, raw_rows.size), np.uint8)
        numbers = raw_rows.astype("<u4").view(np.uint8)
        return [counts, numbers, rows.reshape(-1).view(np.uint8), escapes.view(np.uint8), coded]

    def _decode_layer(
        self, section: Section, layer: LayerTables, part: KvPart, runs: Segments, out: Array
    ) -> None:
        index = symbol_tables(layer, runs)
        found = split_section(section, index.size, layer, out.shape, out.dtype)
        symbols = np.empty(index.size, np.uint8)
        level, head_dim = self._level, self._geometry.head_dim
        decode = rans_compiled.decode if self._is_compiled else decode_reference
        if index.size:
            decode(found.coded, index, level.rans, lanes_for(index.size), symbols)
        elif found.coded.size:
            raise CodecError(f"KV section with {found.coded.size} bytes behind its end")
        cos, sin = self._turns.of(layer, part, out.shape[1])
        if self._is_compiled and self._geometry.dtype != "float16":
            target = out if out.dtype == np.uint16 else out.view(np.uint32)
            lossy_compiled.reconstruct(
                symbols, found.escapes, head_dim, cos, sin, layer, level, runs, target
            )
        elif self._is_compiled:
            wide = np.empty(out.shape, np.uint32)
            lossy_compiled.reconstruct(
                symbols, found.escapes, head_dim, cos, sin, layer, level, runs, wide
            )
            narrow(wide.view(np.float32), "float16", out)
        else:
            x = lossy_reference.reconstruct(
                symbols, found.escapes, out.shape[1], head_dim, cos, sin, layer, level, runs
            )
            narrow_reference(x, self._geometry.dtype, out)
        if found.numbers.size:
            _put_rows(found, layer, out)


def split_section(
    section: Section,
    num_symbols: int,
    layer: LayerTables,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
) -> LossySection:
    """shape, dtype: of the layer, ``[2, T, heads, head_dim]``. Raises CodecError."""
    data = np.frombuffer(section.data, np.uint8)
    if data.size < COUNTS.size:
        raise CodecError(f"KV section of {data.size} bytes")
    num_escapes, num_rows = COUNTS.unpack_from(section.data)
    num_groups, width = layer.mean.shape[1:]
    all_rows, row_bytes = 2 * num_groups * shape[1], width * dtype.itemsize
    if num_escapes > num_symbols or num_rows > all_rows:
        raise CodecError(f"KV section claims {num_escapes} escapes, {num_rows} raw rows")
    ends = np.cumsum([COUNTS.size, 4 * num_rows, row_bytes * num_rows, 2 * num_escapes])
    if ends[-1] > data.size:
        raise CodecError(f"KV section of {data.size} bytes claims {ends[-1]}")
    numbers = data[ends[0] : ends[1]].copy().view("<u4")
    rows = data[ends[1] : ends[2]].copy().view(dtype).reshape(num_rows, width)
    escapes = data[ends[2] : ends[3]].copy().view("<i2")
    if num_rows and (numbers[-1] >= all_rows or (np.diff(numbers.astype(np.int64)) <= 0).any()):
        raise CodecError("KV section with raw rows that do not exist or come twice")
    if num_escapes and np.abs(escapes.astype(np.int32)).max() > MAX_QUOTIENT:
        raise CodecError(f"KV section with an escape beyond {MAX_QUOTIENT}")
    return LossySection(escapes, numbers, rows, data[ends[3] :])


def _take_rows(numbers: NDArray[np.int64], layer: LayerTables, kv: Array) -> Array:
    """``[n, C]``."""
    grouped, place = _grouped(kv, layer), _places(numbers, layer, kv)
    return np.ascontiguousarray(grouped[place])


def _put_rows(section: LossySection, layer: LayerTables, out: Array) -> None:
    place = _places(section.numbers.astype(np.int64), layer, out)
    _grouped(out, layer)[place] = section.rows


def _grouped(kv: Array, layer: LayerTables) -> Array:
    """``[2, T, G, C]``, a view."""
    num_groups, width = layer.mean.shape[1:]
    return kv.reshape(2, kv.shape[1], num_groups, width)


def _places(numbers: NDArray[np.int64], layer: LayerTables, kv: Array) -> tuple[Any, Any, Any]:
    """Kind, token and group of rows by number."""
    row, token = np.divmod(numbers, kv.shape[1])
    kind, group = np.divmod(row, layer.mean.shape[1])
    return kind, token, group
