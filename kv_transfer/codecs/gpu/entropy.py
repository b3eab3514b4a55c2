"""``entropy`` on a GPU: cutting, counting and rANS there; tables and classes on the host.

Layers go through the kernels together, as many as have tables for one ``RansTables``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from kv_transfer.codecs.contract import CodecError
from kv_transfer.codecs.entropy_layer import (
    HEAD,
    Dims,
    LayerParts,
    classify,
    read_layer,
    write_front,
    write_head,
)
from kv_transfer.codecs.float_forms import U8
from kv_transfer.codecs.gpu import rans
from kv_transfer.codecs.gpu.floats import put_together, take_apart
from kv_transfer.codecs.gpu.jit import jit, tl
from kv_transfer.codecs.rans import (
    MAX_TABLES,
    STATE_BYTES,
    WORD_BYTES,
    RansTables,
    check_coded,
    max_coded_bytes,
)
from kv_transfer.codecs.rans_compiled import normalise

_BLOCK = 4096


def encode_layers(bits: Tensor, dims: Dims) -> Iterator[U8]:
    """Each layer coded, one after the other. bits: ``[layers, 2 * n]``."""
    each = MAX_TABLES // (2 * dims.num_classes)
    for begin in range(0, len(bits), each):
        yield from _encode(bits[begin : begin + each], dims)


def decode_layers(sections: Sequence[U8], dims: Dims, bits: Tensor) -> None:
    """Fills ``bits`` ``[layers, 2 * n]``. Raises CodecError."""
    layers = [read_layer(section, dims) for section in sections]
    each = MAX_TABLES // (2 * 4)
    at = 0
    for _, group in groupby(layers, lambda layer: layer.num_lanes):
        alike = list(group)
        for begin in range(0, len(alike), each):
            some = alike[begin : begin + each]
            _decode(some, dims, bits[at : at + len(some)])
            at += len(some)


def _encode(bits: Tensor, dims: Dims) -> Iterator[U8]:
    layers, num_classes, num_lanes = len(bits), dims.num_classes, dims.num_lanes
    symbols, bodies = take_apart(dims.form, bits)
    by_run = symbols.view(layers, 2, dims.tokens, dims.channels)
    sums = (by_run & dims.size_mask).sum(2, dtype=torch.int64).cpu().numpy()
    table_of = np.stack([classify(layer, num_classes) for layer in sums])
    counts = count_symbols(symbols.view(2 * layers, dims.n), table_of, num_classes)
    freqs = normalise(counts.cpu().numpy().reshape(-1, 256))
    device_tables = rans.DeviceTables(RansTables(freqs), bits.device)
    first = np.arange(layers, dtype=np.uint8)[:, None, None] * np.uint8(2 * num_classes)
    index = torch.from_numpy((table_of + first).reshape(2 * layers, -1)).to(bits.device)
    words, num_words, states = rans.encode(
        symbols.view(2 * layers, dims.n), index, device_tables, num_lanes
    )
    lengths = num_words.tolist()
    host_words = words[:, : max(lengths)].cpu().numpy()
    host_states, host_bodies = states.cpu().numpy(), bodies.cpu().numpy()
    by_layer = freqs.reshape(layers, 2 * num_classes, 256)
    for layer in range(layers):
        room = np.empty(dims.max_front_bytes + 2 * max_coded_bytes(dims.n, num_lanes), np.uint8)
        room[HEAD.size : HEAD.size + dims.body_bytes] = host_bodies[layer]
        end, table_bytes = write_front(room, dims, by_layer[layer], table_of[layer])
        sizes = []
        for run in (2 * layer, 2 * layer + 1):
            for part in (host_words[run, : lengths[run]], host_states[run]):
                data = np.ascontiguousarray(part).view(np.uint8)
                room[end : end + data.size] = data
                end += data.size
            sizes.append(lengths[run] * WORD_BYTES + num_lanes * STATE_BYTES)
        write_head(room, dims, table_bytes, (sizes[0], sizes[1]))
        yield room[:end]


def _decode(layers: list[LayerParts], dims: Dims, bits: Tensor) -> None:
    num_lanes = layers[0].num_lanes
    streams = [stream for layer in layers for stream in layer.streams]
    counts = [check_coded(stream, num_lanes) for stream in streams]
    cuts = [count * WORD_BYTES for count in counts]
    words = [stream[:cut] for stream, cut in zip(streams, cuts, strict=True)]
    states = np.stack([stream[cut:] for stream, cut in zip(streams, cuts, strict=True)])
    # One word more: a tensor that is never empty.
    joined = np.concatenate([*words, np.zeros(WORD_BYTES, np.uint8)]).view("<i2")
    indices, first = [], 0
    for layer in layers:
        indices.append(layer.table_of + np.uint8(first))
        first += len(layer.frequencies)
    tables = RansTables(np.concatenate([layer.frequencies for layer in layers]))
    symbols = torch.empty((len(streams), dims.n), dtype=torch.uint8, device=bits.device)

    def up(values: np.typing.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(bits.device)

    is_whole = rans.decode(
        up(joined),
        up(np.cumsum([0, *counts[:-1]])),
        up(np.array(counts, np.int32)),
        up(states.view("<i4")),
        up(np.concatenate(indices)),
        rans.DeviceTables(tables, bits.device),
        symbols,
    )
    if not bool(is_whole.all()):
        raise CodecError(f"a rANS stream of {dims.n} symbols does not end where it began")
    bodies = up(np.stack([layer.body for layer in layers]))
    put_together(dims.form, symbols.view(len(layers), -1), bodies, bits)


def count_symbols(symbols: Tensor, table_of: U8, num_classes: int) -> Tensor:
    """int32 ``[runs, num_classes * 256]``. table_of: ``[layers, 2, channels]``."""
    runs, n = symbols.shape
    classes = np.ascontiguousarray(table_of % num_classes).reshape(runs, -1)
    counts = torch.zeros((runs, num_classes * 256), dtype=torch.int32, device=symbols.device)
    _count_kernel[(runs, -(-n // _BLOCK))](
        symbols, torch.from_numpy(classes).to(symbols.device), counts, n, classes.shape[1],
        BINS=num_classes * 256, BLOCK=_BLOCK,
    )  # fmt: skip
    return counts


@jit("n", "channels")
def _count_kernel(
    symbols_ptr: tl.tensor,
    classes_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    n: tl.tensor,
    channels: tl.tensor,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    run = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_used = i < n
    symbol = tl.load(symbols_ptr + run * n + i, mask=is_used, other=0).to(tl.int32)
    kind = tl.load(classes_ptr + run * channels + i % channels, mask=is_used, other=0)
    found = tl.histogram((kind.to(tl.int32) << 8) | symbol, BINS, mask=is_used)
    place = tl.arange(0, BINS)
    tl.atomic_add(counts_ptr + run * BINS + place, found, mask=found > 0)
