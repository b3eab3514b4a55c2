"""``fp8``: e4m3, with one power of two for K and one for V of a layer.

A section is two int16 exponents ``e``, K's and V's, then K's codes and V's, ``[tokens, channels]``.
``e`` is the least at which no value times ``2**-e`` exceeds 448, the largest e4m3 has; so scaling
is exact and no value is clipped. Scales per head or token do not help (measured on baton-tiny:
10 % less error): what is lost is lost to 3 bits of mantissa. A layer with NaN, infinity or values
from 2**100 on is sent raw.
"""

from __future__ import annotations

import struct
from typing import Any, Protocol

import numpy as np

from kv_transfer.codecs import fp8_compiled
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
    array_dtype,
)
from kv_transfer.codecs.float_forms import U8
from kv_transfer.codecs.float_values import F32, is_tame, narrow_reference, widen_reference
from kv_transfer.codecs.fp8_reference import DECODED

HEAD = struct.Struct("<hh")
MAX_EXPONENT = 100


class Fp8Kernels(Protocol):
    """``fp8_compiled`` or ``fp8_reference``."""

    def widen(self, values: Array, dtype: str) -> F32: ...

    def to_e4m3(self, x: F32, scale: np.float32, codes: U8) -> None: ...

    def look_up(self, codes: U8, table: Array, out: Array) -> None: ...


class Fp8Codec:
    name = "fp8"
    quality = Quality.HIGH

    def __init__(self, geometry: KvGeometry, kernels: Fp8Kernels = fp8_compiled) -> None:
        self._geometry = geometry
        self._kernels = kernels

    def encode(self, kv: Array, part: KvPart) -> Bytes:
        header = header_for(self.name, self._geometry, kv)
        writer = StreamWriter(header)
        for layer in kv:
            n = layer.size // 2
            if HEAD.size + 2 * n >= header.layer_bytes or not is_tame(layer, header.dtype):
                writer.commit_raw(layer)
                continue
            room, exponents = writer.room(), []
            for run, begin in zip(layer, (HEAD.size, HEAD.size + n), strict=True):
                x = self._kernels.widen(run.reshape(-1), header.dtype)
                exponents.append(exponent_of(np.abs(x).max(), "float32"))
                self._kernels.to_e4m3(x, scale_of(exponents[-1]), room[begin : begin + n])
            HEAD.pack_into(room.data, 0, *exponents)
            writer.commit(HEAD.size + 2 * n)
        return writer.finish()

    def decode(self, stream: Bytes, part: KvPart, out: Array) -> None:
        sections = read_sections(stream, header_for(self.name, self._geometry, out))
        for section, layer in zip(sections, out, strict=True):
            if section.form is Form.RAW:
                read_raw(section, layer)
                continue
            if len(section.data) != HEAD.size + layer.size:
                raise CodecError(f"{len(section.data)} bytes of fp8 for {layer.size} values")
            exponents = HEAD.unpack_from(section.data)
            codes = np.frombuffer(section.data, np.uint8)[HEAD.size :].reshape(2, -1)
            for run, exponent, coded in zip(layer, exponents, codes, strict=True):
                table = table_of(exponent, self._geometry.dtype)
                self._kernels.look_up(coded, table, run.reshape(-1))


def exponent_of(largest: Any, dtype: str) -> int:
    """The least ``e`` with ``largest * 2**-e`` not above 448 = 1.75 * 2**8.

    largest: size of a run's largest value, as its array has it.
    """
    bits = int(widen_reference(np.array([largest]), dtype).view(np.uint32)[0])
    exponent = (bits >> 23) - 127 - 8 + ((bits & 0x7FFFFF) > 0x600000)
    return max(exponent, -MAX_EXPONENT)


def scale_of(exponent: int) -> np.float32:
    """What values are multiplied by."""
    return np.float32(2.0**-exponent)


def table_of(exponent: int, dtype: str) -> Array:
    """``[256]``: each code's value, as arrays of the dtype have it. Raises CodecError."""
    if abs(exponent) > MAX_EXPONENT:
        raise CodecError(f"fp8 with exponent {exponent}, at most {MAX_EXPONENT}")
    table = np.empty(256, array_dtype(dtype))
    narrow_reference(DECODED * np.float32(2.0**exponent), dtype, table)
    return table
