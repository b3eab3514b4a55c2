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
    KvGeometry,
    KvPart,
    Quality,
)
from kv_transfer.codecs.entropy_layer import (
    HEAD,
    Dims,
    classify,
    read_layer,
    write_front,
    write_head,
)
from kv_transfer.codecs.float_forms import FORMS, U8, FloatForm, bits_of
from kv_transfer.codecs.rans import RansTables, max_coded_bytes
from kv_transfer.codecs.symbol_counts import Counts


class EntropyKernels(Protocol):
    """``entropy_compiled`` or ``entropy_reference``."""

    def take_apart(self, form: FloatForm, bits: Array, symbols: U8, body: U8) -> None: ...

    def put_together(self, form: FloatForm, symbols: U8, body: U8, bits: Array) -> None: ...

    def sums(self, symbols: U8, mask: int) -> Counts: ...

    def counts(self, symbols: U8, table_of: U8, num_tables: int) -> Counts: ...

    def normalise(self, counts: Counts) -> Counts: ...

    def encode_into(
        self, symbols: U8, index: U8, tables: RansTables, num_lanes: int, out: U8
    ) -> int: ...

    def decode(self, coded: U8, index: U8, tables: RansTables, num_lanes: int, out: U8) -> None: ...


class EntropyCodec:
    name = "entropy"
    quality = Quality.EXACT

    def __init__(self, geometry: KvGeometry, kernels: EntropyKernels = entropy_compiled) -> None:
        self._geometry = geometry
        self._form = FORMS[geometry.dtype]
        self._kernels = kernels

    def encode(self, kv: Array, part: KvPart) -> Bytes:
        header = header_for(self.name, self._geometry, kv)
        dims = self._dims(kv)
        longest = dims.max_front_bytes + 2 * max_coded_bytes(dims.n, dims.num_lanes)
        writer = StreamWriter(header, max(0, longest - header.layer_bytes))
        symbols = np.empty((2, dims.tokens, dims.channels), np.uint8)
        for layer in kv:
            num_bytes = self._encode_layer(bits_of(layer), dims, symbols, writer.room())
            if num_bytes < header.layer_bytes:
                writer.commit(num_bytes)
            else:
                writer.commit_raw(layer)
        return writer.finish()

    def decode(self, stream: Bytes, part: KvPart, out: Array) -> None:
        sections = read_sections(stream, header_for(self.name, self._geometry, out))
        dims = self._dims(out)
        symbols = np.empty((2, dims.tokens, dims.channels), np.uint8)
        for section, layer in zip(sections, out, strict=True):
            if section.form is Form.RAW:
                read_raw(section, layer)
            else:
                coded = np.frombuffer(section.data, np.uint8)
                self._decode_layer(coded, dims, symbols, bits_of(layer))

    def _dims(self, kv: Array) -> Dims:
        return Dims(self._form, kv.shape[2], kv.shape[3] * kv.shape[4])

    def _encode_layer(self, bits: Array, dims: Dims, symbols: U8, room: U8) -> int:
        """Bytes written to the front of ``room``."""
        kernels, body = self._kernels, room[HEAD.size : HEAD.size + dims.body_bytes]
        kernels.take_apart(self._form, bits, symbols.reshape(-1), body)
        table_of = classify(kernels.sums(symbols, dims.size_mask), dims.num_classes)
        freqs = kernels.normalise(kernels.counts(symbols, table_of, 2 * dims.num_classes))
        tables = RansTables(freqs)
        at, table_bytes = write_front(room, dims, freqs, table_of)
        ends: list[int] = []
        for run, index in zip(symbols, table_of, strict=True):
            flat, begin = run.reshape(-1), ends[-1] if ends else at
            length = kernels.encode_into(flat, index, tables, dims.num_lanes, room[begin:])
            ends.append(begin + length)
        write_head(room, dims, table_bytes, (ends[0] - at, ends[1] - ends[0]))
        return ends[1]

    def _decode_layer(self, coded: U8, dims: Dims, symbols: U8, bits: Array) -> None:
        parts = read_layer(coded, dims)
        tables = RansTables(parts.frequencies)
        for run, index, stream in zip(symbols, parts.table_of, parts.streams, strict=True):
            self._kernels.decode(stream, index, tables, parts.num_lanes, run.reshape(-1))
        self._kernels.put_together(self._form, symbols.reshape(-1), parts.body, bits)
