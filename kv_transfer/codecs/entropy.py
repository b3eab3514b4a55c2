"""``entropy``: lossless and small. Symbols of floats (``float_forms``) by rANS, the rest as it is.

Exponents of KV have about 2.5 bits of entropy, so a bfloat16 takes about 10.5 bits. Each layer has
its own tables, counted and sent. Channels differ in size much more than tokens do, so K and V have
four tables each where a layer is large enough to pay for them: channels in order of their mean
symbol, a quarter for each table.

    bytes                what
    1                    binary logarithm of the number of lanes
    1                    tables for each of K and V: 1 or 4
    2                    bytes of the tables
    4, 4                 bytes of K's and of V's rANS stream
    body_bytes * 2n      body planes of the layer's 2n elements
    ...                  K's tables, then V's (``rans_tables``)
    2 * ceil(C / 4)      with four tables: each channel's, four to a byte, K's channels, then V's
    ...                  K's stream, V's stream
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kv_transfer.codecs import entropy_compiled
from kv_transfer.codecs.container import (
    Form,
    StreamWriter,
    header_for,
    read_raw,
    read_sections,
)
from kv_transfer.codecs.contract import (
    Array,
    Bytes,
    CodecError,
    KvGeometry,
    KvPart,
    Quality,
)
from kv_transfer.codecs.float_forms import FORMS, U8, FloatForm, bits_of
from kv_transfer.codecs.rans import MAX_LANES, RansTables, lanes_for, max_coded_bytes
from kv_transfer.codecs.rans_tables import read_tables, write_tables
from kv_transfer.codecs.symbol_counts import Counts

CLASSES = 4
_CLASSES_FROM_ELEMENTS = 16_384
"""Of K in a layer: from here on four tables cost less than they save."""
_HEAD = struct.Struct("<BBHII")
_MAX_TABLE_BYTES = 2 * CLASSES * (2 + 2 * 256)


class EntropyKernels(Protocol):
    """``entropy_compiled`` or ``entropy_reference``."""

    def take_apart(self, form: FloatForm, bits: Array, symbols: U8, body: U8) -> None: ...

    def put_together(self, form: FloatForm, symbols: U8, body: U8, bits: Array) -> None: ...

    def sums(self, symbols: U8) -> Counts: ...

    def counts(self, symbols: U8, table_of: U8, num_tables: int) -> Counts: ...

    def normalise(self, counts: Counts) -> Counts: ...

    def encode_into(
        self, symbols: U8, index: U8, tables: RansTables, num_lanes: int, out: U8
    ) -> int: ...

    def decode(self, coded: U8, index: U8, tables: RansTables, num_lanes: int, out: U8) -> None: ...


@dataclass(frozen=True, slots=True)
class _Dims:
    """n: elements of K in a layer."""

    tokens: int
    channels: int

    @property
    def n(self) -> int:
        return self.tokens * self.channels


class EntropyCodec:
    name = "entropy"
    quality = Quality.EXACT

    def __init__(self, geometry: KvGeometry, kernels: EntropyKernels = entropy_compiled) -> None:
        self._geometry = geometry
        self._form = FORMS[geometry.dtype]
        self._kernels = kernels

    def encode(self, kv: Array, part: KvPart) -> Bytes:
        header = header_for(self.name, self._geometry, kv)
        dims = _dims(kv)
        longest = (
            _HEAD.size + _MAX_TABLE_BYTES + 2 * _packed_classes(dims.channels, CLASSES)
            + 2 * dims.n * self._form.body_bytes + 2 * max_coded_bytes(dims.n, MAX_LANES)
        )  # fmt: skip
        writer = StreamWriter(header, max(0, longest - header.layer_bytes))
        symbols = np.empty((2, dims.tokens, dims.channels), np.uint8)
        for layer in kv:
            num_bytes = self._encode_layer(bits_of(layer), symbols, writer.room())
            if num_bytes < header.layer_bytes:
                writer.commit(num_bytes)
            else:
                writer.commit_raw(layer)
        return writer.finish()

    def decode(self, stream: Bytes, part: KvPart, out: Array) -> None:
        sections = read_sections(stream, header_for(self.name, self._geometry, out))
        dims = _dims(out)
        symbols = np.empty((2, dims.tokens, dims.channels), np.uint8)
        for section, layer in zip(sections, out, strict=True):
            if section.form is Form.RAW:
                read_raw(section, layer)
            else:
                coded = np.frombuffer(section.data, np.uint8)
                self._decode_layer(coded, symbols, bits_of(layer))

    def _encode_layer(self, bits: Array, symbols: U8, room: U8) -> int:
        """Bytes written to the front of ``room``."""
        dims, kernels = _Dims(*symbols.shape[1:]), self._kernels
        num_classes = CLASSES if dims.n >= _CLASSES_FROM_ELEMENTS else 1
        num_lanes = lanes_for(dims.n)
        tables_at = _HEAD.size + bits.size * self._form.body_bytes
        body = room[_HEAD.size : tables_at]
        kernels.take_apart(self._form, bits, symbols.reshape(-1), body)
        table_of = _classify(kernels.sums(symbols), num_classes)
        freqs = kernels.normalise(kernels.counts(symbols, table_of, 2 * num_classes))
        tables = RansTables(freqs)
        written = write_tables(freqs)
        end = tables_at + len(written)
        room[tables_at:end] = np.frombuffer(written, np.uint8)
        if num_classes > 1:
            packed = _pack_classes(table_of % num_classes)
            room[end : end + packed.size] = packed
            end += packed.size
        lengths = []
        for run, index in zip(symbols, table_of, strict=True):
            flat = run.reshape(-1)
            lengths.append(kernels.encode_into(flat, index, tables, num_lanes, room[end:]))
            end += lengths[-1]
        log_lanes = num_lanes.bit_length() - 1
        _HEAD.pack_into(room.data, 0, log_lanes, num_classes, len(written), *lengths)
        return end

    def _decode_layer(self, coded: U8, symbols: U8, bits: Array) -> None:
        dims, kernels = _Dims(*symbols.shape[1:]), self._kernels
        if coded.size < _HEAD.size:
            raise CodecError(f"an entropy-coded layer has {coded.size} bytes")
        log_lanes, num_classes, table_bytes, *lengths = _HEAD.unpack_from(coded.data)
        if 1 << log_lanes > MAX_LANES or num_classes not in (1, CLASSES):
            raise CodecError(
                f"an entropy-coded layer of 2**{log_lanes} lanes, {num_classes} tables"
            )
        tables_at = _HEAD.size + bits.size * self._form.body_bytes
        classes_at = tables_at + table_bytes
        streams_at = classes_at + 2 * _packed_classes(dims.channels, num_classes)
        if streams_at + sum(lengths) != coded.size:
            raise CodecError(f"an entropy-coded layer of {coded.size} bytes: its parts have others")
        tables = RansTables(read_tables(coded[tables_at:classes_at], 2 * num_classes))
        table_of = _unpack_classes(coded[classes_at:streams_at], dims.channels, num_classes)
        at = streams_at
        for run, index, length in zip(symbols, table_of, lengths, strict=True):
            stream = coded[at : at + length]
            kernels.decode(stream, index, tables, 1 << log_lanes, run.reshape(-1))
            at += length
        body = coded[_HEAD.size : tables_at]
        kernels.put_together(self._form, symbols.reshape(-1), body, bits)


def _dims(kv: Array) -> _Dims:
    return _Dims(kv.shape[2], kv.shape[3] * kv.shape[4])


def _classify(sums: Counts, num_classes: int) -> U8:
    """``[2, channels]``: each channel's table; K has the first ``num_classes``, V the others."""
    channels = sums.shape[1]
    table_of = np.empty((2, channels), np.uint8)
    classes = np.arange(channels) * num_classes // channels
    for run in range(2):
        order = np.argsort(sums[run], kind="stable")
        table_of[run, order] = classes + run * num_classes
    return table_of


def _packed_classes(channels: int, num_classes: int) -> int:
    """Bytes of K's or V's classes."""
    return -(-channels // 4) if num_classes > 1 else 0


def _pack_classes(classes: U8) -> U8:
    padded = np.zeros((2, -(-classes.shape[1] // 4) * 4), np.uint8)
    padded[:, : classes.shape[1]] = classes
    a, b, c, d = padded.reshape(-1, 4).T
    packed: U8 = a | b << 2 | c << 4 | d << 6
    return packed


def _unpack_classes(packed: U8, channels: int, num_classes: int) -> U8:
    table_of = np.zeros((2, channels), np.uint8)
    if num_classes > 1:
        each = packed.reshape(2, -1, 1) >> np.array([0, 2, 4, 6], np.uint8) & 3
        table_of[:] = each.reshape(2, -1)[:, :channels]
    table_of[1] += num_classes
    return np.ascontiguousarray(table_of)
