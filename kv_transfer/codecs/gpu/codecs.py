"""Codecs for KV on a GPU by wire name: kernels there, checks and checksums on the host.

Streams are the host codecs', so either side of a transfer may have a GPU or not. What a kernel
finds out (numbers of escapes, sizes) comes down once a frame; so do coded bytes, which are what a
link wants. Decoding checks what a stream says of its lengths on the host before anything goes up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from baton.protocol.errors import ConfigError
from kv_transfer.codecs.container import (
    Form,
    Section,
    StreamHeader,
    StreamWriter,
    header_of_shape,
    read_sections,
)
from kv_transfer.codecs.contract import Array, Bytes, CodecError, KvGeometry, KvPart, array_dtype
from kv_transfer.codecs.entropy_layer import Dims
from kv_transfer.codecs.float_forms import FORMS, U8
from kv_transfer.codecs.fp8 import HEAD as FP8_HEAD
from kv_transfer.codecs.fp8 import exponent_of, scale_of, table_of
from kv_transfer.codecs.gpu import quantise, split
from kv_transfer.codecs.gpu.entropy import decode_layers, encode_layers
from kv_transfer.codecs.gpu.floats import TORCH_DTYPES, are_tame, bits_of
from kv_transfer.codecs.int_groups import num_groups
from kv_transfer.codecs.nibbles import packed_width
from kv_transfer.codecs.split import RUN_HEAD, RunPlan

__all__ = ["NAMES", "GpuCodec", "make"]


class GpuCodec(Protocol):
    """As ``contract.Codec``, for tensors ``[layers, 2, tokens, kv_heads, head_dim]`` of the
    layout's dtype, contiguous, on one device."""

    @property
    def name(self) -> str: ...

    def encode(self, kv: Tensor, part: KvPart) -> Bytes: ...

    def decode(self, stream: Bytes, part: KvPart, out: Tensor) -> None: ...


class _Base:
    name: str

    def __init__(self, geometry: KvGeometry) -> None:
        self._geometry = geometry

    def _header(self, kv: Tensor) -> StreamHeader:
        assert kv.dtype == TORCH_DTYPES[self._geometry.dtype], kv.dtype
        return header_of_shape(self.name, self._geometry, kv.shape)

    def _coded(self, stream: Bytes, out: Tensor) -> tuple[list[int], list[U8]]:
        """(layers whose sections are coded, their bytes); raw sections are written to ``out``."""
        sections = read_sections(stream, self._header(out))
        places = [i for i, s in enumerate(sections) if s.form is Form.CODED]
        for index, section in enumerate(sections):
            if section.form is Form.RAW:
                bits_of(out[index]).copy_(_raw_bits(section, out[index]))
        return places, [np.frombuffer(sections[i].data, np.uint8) for i in places]


class GpuSplit(_Base):
    name = "split"

    def encode(self, kv: Tensor, part: KvPart) -> Bytes:
        header, form = self._header(kv), FORMS[self._geometry.dtype]
        runs = bits_of(kv).view(2 * len(kv), -1)
        n = runs.shape[1]
        begins = split.choose_windows(form, runs)
        codes, bodies, escapes, counts = split.pack(form, runs, begins)
        listed, windows = counts.tolist(), begins.tolist()
        host_codes, host_bodies = codes.cpu().numpy(), bodies.cpu().numpy()
        host_escapes = escapes[:, : max(listed)].cpu().numpy()
        plan, writer = RunPlan.of(form, n), StreamWriter(header)
        for layer in range(len(kv)):
            pair = range(2 * layer, 2 * layer + 2)
            if sum(plan.fixed + listed[run] for run in pair) >= header.layer_bytes:
                _commit_raw(writer, kv[layer])
                continue
            room, end = writer.room(), 0
            for run in pair:
                plan.write_head(room[end:], windows[run], listed[run])
                room[end + RUN_HEAD.size : end + plan.body_at] = host_codes[run]
                room[end + plan.body_at : end + plan.fixed] = host_bodies[run]
                end += plan.fixed + listed[run]
                room[end - listed[run] : end] = host_escapes[run, : listed[run]]
            writer.commit(end)
        return writer.finish()

    def decode(self, stream: Bytes, part: KvPart, out: Tensor) -> None:
        form = FORMS[self._geometry.dtype]
        places, sections = self._coded(stream, out)
        if not places:
            return
        n = out[0].numel() // 2
        plan, begins, parts = RunPlan.of(form, n), [], []
        for section in sections:
            coded = section
            for _ in range(2):
                begin, num_escapes = plan.read_head(form, n, coded)
                begins.append(begin)
                parts.append(coded[: plan.fixed + num_escapes])
                coded = coded[plan.fixed + num_escapes :]
            if coded.size:
                raise CodecError(f"a section of split floats has {coded.size} bytes too many")
        listed = [part.size - plan.fixed for part in parts]
        escapes = np.concatenate([*(part[plan.fixed :] for part in parts), np.zeros(1, np.uint8)])
        fixed = _up(np.stack([part[: plan.fixed] for part in parts]), out)
        bits = torch.empty((len(parts), n), dtype=bits_of(out).dtype, device=out.device)
        is_whole = split.unpack(
            form,
            fixed[:, RUN_HEAD.size : plan.body_at].contiguous(),
            fixed[:, plan.body_at :].contiguous(),
            _up(escapes, out),
            _up(np.cumsum([0, *listed[:-1]]), out),
            _up(np.array(listed), out),
            _up(np.array(begins, np.int32), out),
            bits,
        )
        if not bool(is_whole.all()):
            raise CodecError("split floats list escapes and do not use as many")
        bits_of(out)[places] = bits.view(len(places), *out.shape[1:])


class GpuIntegers(_Base):
    def __init__(self, geometry: KvGeometry, num_bits: int) -> None:
        super().__init__(geometry)
        self.name = f"int{num_bits}"
        self._num_bits = num_bits

    def _sizes(self, tokens: int, channels: int) -> tuple[int, int, int]:
        """(groups, bytes of a row of codes, bytes of a run)."""
        width = channels if self._num_bits == 8 else packed_width(channels)
        groups = num_groups(tokens)
        return groups, width, groups * channels * 4 + tokens * width

    def encode(self, kv: Tensor, part: KvPart) -> Bytes:
        header, writer = self._header(kv), StreamWriter(self._header(kv))
        tokens, channels = kv.shape[2], kv.shape[3] * kv.shape[4]
        *_, run_bytes = self._sizes(tokens, channels)
        dtype = self._geometry.dtype
        places = _tame_layers(kv, dtype) if 2 * run_bytes < header.layer_bytes else []
        coded: Iterator[U8] = iter(())
        if places:
            bits = _layers(bits_of(kv), places).view(-1, tokens, channels)
            fields = quantise.quantise(bits, dtype, self._num_bits)
            each = [_bytes(field).view(len(places), 2, -1) for field in fields]
            coded = iter(torch.cat(each, dim=2).flatten(1).cpu().numpy())
        for layer in range(len(kv)):
            if layer in places:
                writer.room()[: 2 * run_bytes] = next(coded)
                writer.commit(2 * run_bytes)
            else:
                _commit_raw(writer, kv[layer])
        return writer.finish()

    def decode(self, stream: Bytes, part: KvPart, out: Tensor) -> None:
        tokens, channels = out.shape[2], out.shape[3] * out.shape[4]
        groups, width, run_bytes = self._sizes(tokens, channels)
        places, sections = self._coded(stream, out)
        if not places:
            return
        for section in sections:
            if section.size != 2 * run_bytes:
                raise CodecError(f"{section.size} bytes of {self.name}, not {2 * run_bytes}")
        runs = _up(np.stack(sections).reshape(-1, run_bytes), out)
        size = 2 * groups * channels
        bits = torch.empty(
            (len(runs), tokens, channels), dtype=bits_of(out).dtype, device=out.device
        )
        quantise.restore(
            runs[:, :size].contiguous().view(torch.int16).view(-1, groups, channels),
            runs[:, size : 2 * size].contiguous().view(torch.int16).view(-1, groups, channels),
            runs[:, 2 * size :].contiguous().view(-1, tokens, width),
            self._geometry.dtype,
            bits,
        )
        bits_of(out)[places] = bits.view(len(places), *out.shape[1:])


class GpuFp8(_Base):
    name = "fp8"

    def encode(self, kv: Tensor, part: KvPart) -> Bytes:
        header, dtype = self._header(kv), self._geometry.dtype
        writer = StreamWriter(header)
        n = kv[0].numel() // 2
        num_bytes = FP8_HEAD.size + 2 * n
        places = _tame_layers(kv, dtype) if num_bytes < header.layer_bytes else []
        coded: Iterator[tuple[list[int], U8]] = iter(())
        if places:
            bits = _layers(bits_of(kv), places).view(-1, n)
            # Without the sign, bits are in order of size.
            top = (bits & (0x7FFFFFFF if dtype == "float32" else 0x7FFF)).amax(1).cpu().numpy()
            exponents = [exponent_of(size, dtype) for size in top.view(array_dtype(dtype))]
            scales = np.array([scale_of(e) for e in exponents], np.float32)
            codes = quantise.to_e4m3(bits, dtype, _up(scales, kv)).view(-1, 2 * n).cpu().numpy()
            pairs = [exponents[i : i + 2] for i in range(0, len(exponents), 2)]
            coded = zip(pairs, codes, strict=True)
        for layer in range(len(kv)):
            if layer in places:
                pair, layer_codes = next(coded)
                room = writer.room()
                FP8_HEAD.pack_into(room.data, 0, *pair)
                room[FP8_HEAD.size : num_bytes] = layer_codes
                writer.commit(num_bytes)
            else:
                _commit_raw(writer, kv[layer])
        return writer.finish()

    def decode(self, stream: Bytes, part: KvPart, out: Tensor) -> None:
        places, sections = self._coded(stream, out)
        if not places:
            return
        n, tables = out[0].numel() // 2, []
        for section in sections:
            if section.size != FP8_HEAD.size + 2 * n:
                raise CodecError(f"{section.size} bytes of fp8 for {2 * n} values")
            for exponent in FP8_HEAD.unpack_from(section.data):
                tables.append(table_of(exponent, self._geometry.dtype))
        codes = _up(np.stack(sections)[:, FP8_HEAD.size :].reshape(-1, n), out)
        bits = torch.empty(codes.shape, dtype=bits_of(out).dtype, device=out.device)
        signed = np.int32 if bits.dtype == torch.int32 else np.int16
        quantise.look_up(codes, _up(np.stack(tables).view(signed), out), bits)
        bits_of(out)[places] = bits.view(len(places), *out.shape[1:])


class GpuRaw(_Base):
    name = "raw"

    def encode(self, kv: Tensor, part: KvPart) -> Bytes:
        writer = StreamWriter(self._header(kv))
        for layer in kv:
            _commit_raw(writer, layer)
        return writer.finish()

    def decode(self, stream: Bytes, part: KvPart, out: Tensor) -> None:
        places, _ = self._coded(stream, out)
        if places:
            raise CodecError("a section of a raw KV stream is coded")


class GpuEntropy(_Base):
    name = "entropy"

    def _dims(self, kv: Tensor) -> Dims:
        return Dims(FORMS[self._geometry.dtype], kv.shape[2], kv.shape[3] * kv.shape[4])

    def encode(self, kv: Tensor, part: KvPart) -> Bytes:
        header = self._header(kv)
        writer = StreamWriter(header)
        coded = encode_layers(bits_of(kv).view(len(kv), -1), self._dims(kv))
        for layer, data in zip(kv, coded, strict=True):
            if data.size < header.layer_bytes:
                writer.room()[: data.size] = data
                writer.commit(data.size)
            else:
                _commit_raw(writer, layer)
        return writer.finish()

    def decode(self, stream: Bytes, part: KvPart, out: Tensor) -> None:
        places, sections = self._coded(stream, out)
        if places:
            kind, size = bits_of(out).dtype, out[0].numel()
            bits = torch.empty((len(places), size), dtype=kind, device=out.device)
            decode_layers(sections, self._dims(out), bits)
            bits_of(out)[places] = bits.view(len(places), *out.shape[1:])


_MAKERS: dict[str, Callable[[KvGeometry], GpuCodec]] = {
    "raw": GpuRaw,
    "split": GpuSplit,
    "entropy": GpuEntropy,
    "int8": lambda geometry: GpuIntegers(geometry, 8),
    "int4": lambda geometry: GpuIntegers(geometry, 4),
    "fp8": GpuFp8,
}
NAMES = tuple(_MAKERS)


def make(name: str, geometry: KvGeometry) -> GpuCodec:
    """Raises ConfigError for a name without kernels."""
    if name not in _MAKERS:
        raise ConfigError(f"no KV codec {name!r} on GPUs; there are {', '.join(NAMES)}")
    return _MAKERS[name](geometry)


def _tame_layers(kv: Tensor, dtype: str) -> list[int]:
    return [i for i, is_tame in enumerate(are_tame(bits_of(kv), dtype)) if is_tame]


def _layers(bits: Tensor, places: list[int]) -> Tensor:
    """Those of ``places``; the same tensor where that is all."""
    return bits if len(places) == len(bits) else bits[places]


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _up(values: Array, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device)


def _commit_raw(writer: StreamWriter, layer: Tensor) -> None:
    writer.commit_raw(bits_of(layer).cpu().numpy())


def _raw_bits(section: Section, layer: Tensor) -> Tensor:
    kind = np.int32 if layer.element_size() == 4 else np.int16
    host = np.frombuffer(bytes(section.data), kind).reshape(layer.shape)
    return torch.from_numpy(host.copy()).to(layer.device)
