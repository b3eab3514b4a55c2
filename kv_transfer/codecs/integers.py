"""``int8`` and ``int4``: every value as an integer of its channel's step (``int_groups``).

A section is K, then V; each: the groups' steps (bfloat16) and zeros (int16), both
``[groups, channels]``, then the codes, ``[tokens, channels]`` bytes or ``nibbles``. All lengths
follow from the dims. A layer with NaN, infinity or values from 2**100 on is sent raw.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kv_transfer.codecs import integers_compiled
from kv_transfer.codecs.container import (
    Form,
    StreamWriter,
    header_for,
    read_raw,
    read_sections,
)
from kv_transfer.codecs.contract import Array, Bytes, CodecError, KvGeometry, KvPart, Quality
from kv_transfer.codecs.float_forms import U8
from kv_transfer.codecs.float_values import F32, is_tame
from kv_transfer.codecs.int_groups import I16, U16, num_groups
from kv_transfer.codecs.nibbles import packed_width


class IntegerKernels(Protocol):
    """``integers_compiled`` or ``integers_reference``."""

    def widen(self, values: Array, dtype: str) -> F32: ...

    def narrow(self, x: F32, dtype: str, out: Array) -> None: ...

    def quantise(self, x: F32, levels: int, steps: U16, zeros: I16, codes: U8) -> None: ...

    def restore(self, codes: U8, steps: U16, zeros: I16, x: F32) -> None: ...

    def pack_rows(self, codes: U8, packed: U8) -> None: ...

    def unpack_rows(self, packed: U8, codes: U8) -> None: ...


class IntegerCodec:
    def __init__(
        self,
        geometry: KvGeometry,
        num_bits: int,
        quality: Quality,
        kernels: IntegerKernels = integers_compiled,
    ) -> None:
        assert num_bits in (4, 8), num_bits
        self._geometry = geometry
        self._num_bits = num_bits
        self._quality = quality
        self._kernels = kernels

    @property
    def name(self) -> str:
        return f"int{self._num_bits}"

    @property
    def quality(self) -> Quality:
        return self._quality

    def encode(self, kv: Array, part: KvPart) -> Bytes:
        header = header_for(self.name, self._geometry, kv)
        writer = StreamWriter(header)
        rows = kv.reshape(*kv.shape[:3], -1)
        run_bytes = self._run_bytes(*rows.shape[2:])
        for layer in rows:
            if 2 * run_bytes >= header.layer_bytes or not is_tame(layer, header.dtype):
                writer.commit_raw(layer)
                continue
            room = writer.room()
            for run, begin in zip(layer, (0, run_bytes), strict=True):
                self._encode_run(run, room[begin : begin + run_bytes])
            writer.commit(2 * run_bytes)
        return writer.finish()

    def decode(self, stream: Bytes, part: KvPart, out: Array) -> None:
        sections = read_sections(stream, header_for(self.name, self._geometry, out))
        rows = out.reshape(*out.shape[:3], -1)
        run_bytes = self._run_bytes(*rows.shape[2:])
        for section, layer in zip(sections, rows, strict=True):
            if section.form is Form.RAW:
                read_raw(section, layer)
                continue
            if len(section.data) != 2 * run_bytes:
                raise CodecError(f"{len(section.data)} bytes of {self.name}, not {2 * run_bytes}")
            coded = np.frombuffer(section.data, np.uint8).reshape(2, run_bytes)
            for run, data in zip(layer, coded, strict=True):
                self._decode_run(data, run)

    def _code_width(self, channels: int) -> int:
        return channels if self._num_bits == 8 else packed_width(channels)

    def _run_bytes(self, tokens: int, channels: int) -> int:
        return num_groups(tokens) * channels * 4 + tokens * self._code_width(channels)

    def _encode_run(self, run: Array, room: U8) -> None:
        tokens, channels = run.shape
        shape = (num_groups(tokens), channels)
        steps, zeros = np.empty(shape, np.uint16), np.empty(shape, np.int16)
        coded = room[4 * steps.size :].reshape(tokens, -1)
        codes = coded if self._num_bits == 8 else np.empty(run.shape, np.uint8)
        x = self._kernels.widen(run, self._geometry.dtype)
        self._kernels.quantise(x, 2**self._num_bits - 1, steps, zeros, codes)
        if self._num_bits == 4:
            self._kernels.pack_rows(codes, coded)
        room[: 2 * steps.size] = _bytes_of(steps)
        room[2 * steps.size : 4 * steps.size] = _bytes_of(zeros)

    def _decode_run(self, data: U8, run: Array) -> None:
        tokens, channels = run.shape
        size, shape = num_groups(tokens) * channels, (num_groups(tokens), channels)
        steps = data[: 2 * size].copy().view("<u2").reshape(shape)
        zeros = data[2 * size : 4 * size].copy().view("<i2").reshape(shape)
        coded = data[4 * size :].reshape(tokens, -1)
        codes = coded if self._num_bits == 8 else np.empty(run.shape, np.uint8)
        if self._num_bits == 4:
            self._kernels.unpack_rows(coded, codes)
        x = np.empty(run.shape, np.float32)
        self._kernels.restore(codes, steps, zeros, x)
        self._kernels.narrow(x, self._geometry.dtype, run)


def _bytes_of(values: NDArray[np.uint16] | NDArray[np.int16]) -> U8:
    return values.reshape(-1).view(np.uint8)
