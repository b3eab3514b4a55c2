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
from kv_transfer.codecs.contract import Array, Bytes, CodecError, KvGeometry, KvPart, Quality
from kv_transfer.codecs.float_forms import U8
from kv_transfer.codecs.float_values import F32, is_tame, narrow_reference
from kv_transfer.codecs.fp8_reference import DECODED

_HEAD = struct.Struct("<hh")
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
            if _HEAD.size + 2 * n >= header.layer_bytes or not is_tame(layer, header.dtype):
                writer.commit_raw(layer)
                continue
            room, exponents = writer.room(), []
            for run, begin in zip(layer, (_HEAD.size, _HEAD.size + n), strict=True):
                x = self._kernels.widen(run.reshape(-1), header.dtype)
                exponents.append(_exponent(x))
                scale = np.float32(2.0 ** -exponents[-1])
                self._kernels.to_e4m3(x, scale, room[begin : begin + n])
            _HEAD.pack_into(room.data, 0, *exponents)
            writer.commit(_HEAD.size + 2 * n)
        return writer.finish()

    def decode(self, stream: Bytes, part: KvPart, out: Array) -> None:
        sections = read_sections(stream, header_for(self.name, self._geometry, out))
        for section, layer in zip(sections, out, strict=True):
            if section.form is Form.RAW:
                read_raw(section, layer)
                continue
            if len(section.data) != _HEAD.size + layer.size:
                raise CodecError(f"{len(section.data)} bytes of fp8 for {layer.size} values")
            exponents = _HEAD.unpack_from(section.data)
            codes = np.frombuffer(section.data, np.uint8)[_HEAD.size :].reshape(2, -1)
            for run, exponent, coded in zip(layer, exponents, codes, strict=True):
                if abs(exponent) > MAX_EXPONENT:
                    raise CodecError(f"fp8 with exponent {exponent}, at most {MAX_EXPONENT}")
                table = np.empty(256, out.dtype)
                narrow_reference(DECODED * np.float32(2.0**exponent), self._geometry.dtype, table)
                self._kernels.look_up(coded, table, run.reshape(-1))


def _exponent(x: F32) -> int:
    """The least ``e`` with no value times ``2**-e`` above 448 = 1.75 * 2**8."""
    bits = int(np.abs(x).max().view(np.uint32))
    exponent: Any = (bits >> 23) - 127 - 8 + ((bits & 0x7FFFFF) > 0x600000)
    return max(int(exponent), -MAX_EXPONENT)
