"""Calls every kernel of the KV codecs once for each of its forms, for ``compile_kernels``.

Launches compile and do not run, so results are what memory held; nothing here looks at them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kv_transfer.codecs.float_forms import FORMS
from kv_transfer.codecs.gpu import entropy, floats, lossy, quantise, rans, split
from kv_transfer.codecs.rans import RansTables

RUNS, TOKENS, CHANNELS = 4, 64, 128
N = TOKENS * CHANNELS


def codec_variants() -> Iterator[str]:
    """Yields what was just compiled."""
    for dtype, form in FORMS.items():
        bits = _zeros(RUNS, N, kind=torch.int32 if dtype == "float32" else torch.int16)
        begins = split.choose_windows(form, bits)
        codes, bodies, escapes, counts = split.pack(form, bits, begins)
        offsets = torch.zeros_like(counts)
        split.unpack(form, codes, bodies, escapes, offsets, counts, begins, bits)
        yield f"split, {dtype}"
        symbols, bodies = floats.take_apart(form, bits)
        floats.put_together(form, symbols, bodies, bits)
        yield f"floats, {dtype}"
        rows = bits.view(RUNS, TOKENS, CHANNELS)
        for num_bits in (8, 4):
            steps, zeros, codes = quantise.quantise(rows, dtype, num_bits)
            quantise.restore(steps, zeros, codes, dtype, rows)
            yield f"int{num_bits}, {dtype}"
        codes = quantise.to_e4m3(bits, dtype, _zeros(RUNS, kind=torch.float32))
        quantise.look_up(codes, _zeros(RUNS, 256, kind=bits.dtype), bits)
        yield f"fp8, {dtype}"
        _lossy(rows[:2], dtype)
        yield f"kv1 to kv4, {dtype}"
    for num_classes in (1, 4):
        table_of = np.zeros((RUNS // 2, 2, CHANNELS), np.uint8)
        entropy.count_symbols(_zeros(RUNS, N), table_of, num_classes)
        yield f"entropy, {num_classes} tables"
    tables = rans.DeviceTables(RansTables(np.full((64, 32), 128)), torch.device("cpu"))
    symbols, index = _zeros(RUNS, N), _zeros(RUNS, CHANNELS)
    for num_lanes in (32, 256):
        words, num_words, states = rans.encode(symbols, index, tables, num_lanes)
        offsets = _zeros(RUNS, kind=torch.int64)
        rans.decode(words.view(-1), offsets, num_words, states, index, tables, symbols)
        yield f"rans, {num_lanes} lanes"


def _lossy(bits: Tensor, dtype: str) -> None:
    """Two heads of 64 as one group, five age classes."""

    def whole(*shape: int) -> Tensor:
        return _zeros(*shape, kind=torch.int32)

    def real(*shape: int) -> Tensor:
        return _zeros(*shape, kind=torch.float32)

    width, ages, pairs = CHANNELS, 5, 32
    layer = lossy.DeviceLayer(
        mean=real(2, 1, width),
        grid=real(2, 1, width),
        analysis=real(2, 1, width, width),
        multiplier=real(2, 1, ages, width),
        synthesis=real(2, 1, width, width),
        factor=real(2, 1, ages, width),
        rank=whole(2, 1, ages),
        limit=whole(2, 1, ages, width),
        shrink=whole(2, 1, ages, width, 2),
    )
    places = lossy.Places(
        whole(TOKENS),
        _zeros(2, TOKENS, kind=torch.int64),
        real(TOKENS, pairs),
        real(TOKENS, pairs),
    )
    _, quotients, _ = lossy.quantise(bits, dtype, 64, layer, places, N)
    lossy.reconstruct(quotients, dtype, 64, layer, places, bits)


def _zeros(*shape: int, kind: torch.dtype = torch.uint8) -> Tensor:
    return torch.zeros(shape, dtype=kind)
