"""``kv1`` to ``kv4`` for tensors on a device: the streams of ``kv_transfer.codecs.lossy``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kv_transfer.codecs.container import Form, StreamHeader, StreamWriter, read_sections
from kv_transfer.codecs.container import header_of_shape as header_of
from kv_transfer.codecs.contract import Array, Bytes, CodecError, KvGeometry, KvPart, array_dtype
from kv_transfer.codecs.gpu import rans
from kv_transfer.codecs.gpu.floats import TORCH_DTYPES, bits_of
from kv_transfer.codecs.gpu.lossy import DeviceLayer, Places, quantise, reconstruct
from kv_transfer.codecs.lossy import COUNTS, LossySection, split_section
from kv_transfer.codecs.lossy_profile import ESCAPE, ZERO_SYMBOL, Profile
from kv_transfer.codecs.lossy_tables import (
    LayerTables,
    Segments,
    Turns,
    layers_of,
    level_tables,
    segments,
    symbol_tables,
)
from kv_transfer.codecs.rans import STATE_BYTES, U8, WORD_BYTES, check_coded, lanes_for


class GpuLossyCodec:
    """See ``GpuCodec``. Raises ConfigError for a profile of another model's shape."""

    def __init__(self, geometry: KvGeometry, profile: Profile, name: str) -> None:
        profile.check_shape(geometry)
        self._geometry = geometry
        self._digest = profile.digest()
        self.name = name
        self._level = level_tables(profile, profile.level(name))
        self._turns = Turns()
        self._on: dict[torch.device, tuple[rans.DeviceTables, list[DeviceLayer]]] = {}

    def encode(self, kv: Tensor, part: KvPart) -> Bytes:
        header = self._header(kv)
        writer = StreamWriter(header)
        runs = segments(self._level.ages, part, kv.shape[2])
        host_layers = layers_of(self._level, part, len(kv))
        tables, device_layers = self._tables(kv.device)
        for place, layer in enumerate(host_layers):
            pieces = self._encode_layer(
                bits_of(kv[place]),
                layer,
                device_layers[part.layer_start + place],
                tables,
                runs,
                part,
            )
            size = sum(piece.nbytes for piece in pieces)
            if size >= header.layer_bytes:
                writer.commit_raw(bits_of(kv[place]).cpu().numpy())
                continue
            at, room = 0, writer.room()
            for piece in pieces:
                room[at : at + piece.nbytes] = piece.reshape(-1).view(np.uint8)
                at += piece.nbytes
            writer.commit(size)
        return writer.finish()

    def decode(self, stream: Bytes, part: KvPart, out: Tensor) -> None:
        runs = segments(self._level.ages, part, out.shape[2])
        host_layers = layers_of(self._level, part, len(out))
        tables, device_layers = self._tables(out.device)
        sections = read_sections(stream, self._header(out))
        for place, (section, layer) in enumerate(zip(sections, host_layers, strict=True)):
            bits = bits_of(out[place])
            if section.form is Form.RAW:
                kind = np.int32 if out.element_size() == 4 else np.int16
                raw = np.frombuffer(bytes(section.data), kind).reshape(bits.shape)
                bits.copy_(torch.from_numpy(raw.copy()))
                continue
            index = symbol_tables(layer, runs)
            shape, dtype = tuple(bits.shape), array_dtype(self._geometry.dtype)
            found = split_section(section, index.size, layer, shape, dtype)
            device_layer = device_layers[part.layer_start + place]
            self._decode_layer(found, index, layer, device_layer, tables, runs, part, bits)

    def _header(self, kv: Tensor) -> StreamHeader:
        assert kv.dtype == TORCH_DTYPES[self._geometry.dtype], kv.dtype
        return header_of(self.name, self._geometry, kv.shape, self._digest)

    def _encode_layer(
        self,
        bits: Tensor,
        layer: LayerTables,
        on_device: DeviceLayer,
        tables: rans.DeviceTables,
        runs: Segments,
        part: KvPart,
    ) -> list[Array]:
        """Pieces of the section, in order."""
        num_tokens = bits.shape[1]
        index = symbol_tables(layer, runs)
        places = self._places(layer, runs, part, num_tokens, bits.device)
        flat = bits.reshape(2, num_tokens, -1)
        dtype, head_dim = self._geometry.dtype, self._geometry.head_dim
        symbols, quotients, is_raw = quantise(flat, dtype, head_dim, on_device, places, index.size)
        escapes = quotients[symbols == ESCAPE].cpu().numpy()
        numbers = is_raw.view(-1).nonzero().view(-1)
        groups, width = layer.mean.shape[1:]
        rows = flat.view(2, num_tokens, groups, width).transpose(1, 2).reshape(-1, width)[numbers]
        counts = np.frombuffer(COUNTS.pack(escapes.size, len(numbers)), np.uint8)
        pieces: list[Array] = [counts, numbers.cpu().numpy().astype("<u4")]
        pieces += [rows.cpu().numpy(), escapes]
        if index.size:
            lanes = lanes_for(index.size)
            row = torch.from_numpy(index).to(bits.device)[None]
            words, num_words, states = rans.encode(symbols[None], row, tables, lanes)
            pieces += [words[0, : int(num_words[0])].cpu().numpy(), states[0].cpu().numpy()]
        return pieces

    def _decode_layer(
        self,
        section: LossySection,
        index: U8,
        layer: LayerTables,
        on_device: DeviceLayer,
        tables: rans.DeviceTables,
        runs: Segments,
        part: KvPart,
        bits: Tensor,
    ) -> None:
        num_tokens, device = bits.shape[1], bits.device
        symbols = self._symbols(section.coded, index, tables, device)
        quotients = symbols.to(torch.int16) - ZERO_SYMBOL
        is_escaped = symbols == ESCAPE
        if int(is_escaped.sum()) != section.escapes.size:
            raise CodecError(f"KV section with {section.escapes.size} escapes uses others")
        quotients[is_escaped] = torch.from_numpy(section.escapes.astype(np.int16)).to(device)
        places = self._places(layer, runs, part, num_tokens, device)
        flat = bits.view(2, num_tokens, -1)
        dtype, head_dim = self._geometry.dtype, self._geometry.head_dim
        reconstruct(quotients, dtype, head_dim, on_device, places, flat)
        if section.numbers.size:
            groups, width = layer.mean.shape[1:]
            numbers = torch.from_numpy(section.numbers.astype(np.int64)).to(device)
            row, token = numbers // num_tokens, numbers % num_tokens
            values = torch.from_numpy(section.rows.view(f"<i{bits.element_size()}").copy())
            grouped = flat.view(2, num_tokens, groups, width)
            grouped[row // groups, token, row % groups] = values.to(device)

    def _symbols(
        self, coded: U8, index: U8, tables: rans.DeviceTables, device: torch.device
    ) -> Tensor:
        """uint8 ``[n]``. Raises CodecError."""
        symbols = torch.empty((1, index.size), dtype=torch.uint8, device=device)
        if not index.size:
            if coded.size:
                raise CodecError(f"KV section with {coded.size} bytes behind its end")
            return symbols[0]
        lanes = lanes_for(index.size)
        num_words = check_coded(coded, lanes)
        padded = np.zeros(num_words + 1, "<i2")
        padded[:num_words] = coded[: num_words * WORD_BYTES].copy().view("<i2")
        states = coded[num_words * WORD_BYTES :].copy().view(f"<i{STATE_BYTES}")
        up = [torch.from_numpy(a).to(device) for a in (padded, states[None], index[None])]
        offsets = torch.zeros(1, dtype=torch.int64, device=device)
        counts = torch.tensor([num_words], dtype=torch.int32, device=device)
        is_whole = rans.decode(up[0], offsets, counts, up[1], up[2], tables, symbols)
        if not int(is_whole[0]):
            raise CodecError(f"rANS stream of {index.size} symbols does not end where it began")
        return symbols[0]

    def _places(
        self,
        layer: LayerTables,
        runs: Segments,
        part: KvPart,
        num_tokens: int,
        device: torch.device,
    ) -> Places:
        ages = np.repeat(runs.kind, np.diff(runs.end, prepend=0))
        counts = layer.rank.reshape(-1, layer.rank.shape[2])[:, ages].astype(np.int64)
        ends = counts.reshape(-1).cumsum().reshape(counts.shape)
        cos, sin = self._turns.of(layer, part, num_tokens)
        up = [torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (cos, sin)]
        return Places(
            torch.from_numpy(ages.astype(np.int32)).to(device),
            torch.from_numpy(ends - counts).to(device),
            *up,
        )

    def _tables(self, device: torch.device) -> tuple[rans.DeviceTables, list[DeviceLayer]]:
        if device not in self._on:
            level = self._level
            layers = []
            for layer in level.layers:
                arrays = (
                    layer.mean,
                    layer.grid,
                    layer.analysis,
                    layer.multiplier,
                    layer.synthesis.astype(np.float32),
                    layer.factor,
                    layer.rank,
                    level.limit[layer.table],
                    level.shrink[layer.table],
                )
                up = [torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in arrays]
                layers.append(DeviceLayer(*up))
            self._on[device] = rans.DeviceTables(level.rans, device), layers
        return self._on[device]
