"""One layer of an ``entropy`` stream: where its parts are, and which channel has which table.

Shared by the host's codec and the GPU's; ``entropy`` has the description of the bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kv_transfer.codecs.contract import CodecError
from kv_transfer.codecs.float_forms import U8, FloatForm
from kv_transfer.codecs.rans import MAX_LANES, lanes_for
from kv_transfer.codecs.rans_tables import read_tables, write_tables
from kv_transfer.codecs.symbol_counts import Counts

CLASSES = 4
MAX_TABLE_BYTES = 2 * CLASSES * (2 + 2 * 256)
_CLASSES_FROM_ELEMENTS = 16_384
"""Of K in a layer: from here on four tables cost less than they save."""
HEAD = struct.Struct("<BBHII")


@dataclass(frozen=True, slots=True)
class Dims:
    """n: elements of K in a layer. body_bytes: of K and V."""

    form: FloatForm
    tokens: int
    channels: int

    @property
    def n(self) -> int:
        return self.tokens * self.channels

    @property
    def body_bytes(self) -> int:
        return 2 * self.n * self.form.body_bytes

    @property
    def num_lanes(self) -> int:
        return lanes_for(self.n)

    @property
    def num_classes(self) -> int:
        """Tables for each of K and V, when encoding."""
        is_large = self.n >= _CLASSES_FROM_ELEMENTS and self.channels >= CLASSES
        return CLASSES if is_large else 1

    @property
    def size_mask(self) -> int:
        """Of a symbol, what says how large the value is."""
        return 0x7F if self.form.dtype == "float16" else 0xFF

    @property
    def max_front_bytes(self) -> int:
        return HEAD.size + self.body_bytes + MAX_TABLE_BYTES + 2 * packed_classes(self.channels, 4)


@dataclass(frozen=True, slots=True)
class LayerParts:
    """A coded layer's parts, all of lengths that fit. ``table_of``: ``[2, channels]``."""

    num_lanes: int
    body: U8
    frequencies: NDArray[np.int64]
    table_of: U8
    streams: tuple[U8, U8]


def write_front(room: U8, dims: Dims, frequencies: Counts, table_of: U8) -> tuple[int, int]:
    """Writes tables and classes behind head and body; returns (where streams begin, bytes of the
    tables)."""
    tables_at = HEAD.size + dims.body_bytes
    written = write_tables(frequencies)
    end = tables_at + len(written)
    room[tables_at:end] = np.frombuffer(written, np.uint8)
    num_classes = len(frequencies) // 2
    if num_classes > 1:
        packed = _pack_classes(table_of % num_classes)
        room[end : end + packed.size] = packed
        end += packed.size
    return end, len(written)


def write_head(room: U8, dims: Dims, table_bytes: int, lengths: tuple[int, int]) -> None:
    """lengths: bytes of K's and V's streams."""
    log_lanes = dims.num_lanes.bit_length() - 1
    HEAD.pack_into(room.data, 0, log_lanes, dims.num_classes, table_bytes, *lengths)


def read_layer(coded: U8, dims: Dims) -> LayerParts:
    """Raises CodecError where the lengths do not make up the layer."""
    if coded.size < HEAD.size:
        raise CodecError(f"an entropy-coded layer has {coded.size} bytes")
    log_lanes, num_classes, table_bytes, for_k, for_v = HEAD.unpack_from(coded.data)
    if 1 << log_lanes > MAX_LANES or num_classes not in (1, CLASSES):
        raise CodecError(f"an entropy-coded layer of 2**{log_lanes} lanes, {num_classes} tables")
    tables_at = HEAD.size + dims.body_bytes
    classes_at = tables_at + table_bytes
    streams_at = classes_at + 2 * packed_classes(dims.channels, num_classes)
    if streams_at + for_k + for_v != coded.size:
        raise CodecError(f"an entropy-coded layer of {coded.size} bytes: its parts have others")
    return LayerParts(
        1 << log_lanes,
        coded[HEAD.size : tables_at],
        read_tables(coded[tables_at:classes_at], 2 * num_classes),
        _unpack_classes(coded[classes_at:streams_at], dims.channels, num_classes),
        (coded[streams_at : streams_at + for_k], coded[streams_at + for_k :]),
    )


def classify(sums: Counts, num_classes: int) -> U8:
    """``[2, channels]``: each channel's table; K has the first ``num_classes``, V the others."""
    channels = sums.shape[1]
    table_of = np.empty((2, channels), np.uint8)
    classes = np.arange(channels) * num_classes // channels
    for run in range(2):
        order = np.argsort(sums[run], kind="stable")
        table_of[run, order] = classes + run * num_classes
    return table_of


def packed_classes(channels: int, num_classes: int) -> int:
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
