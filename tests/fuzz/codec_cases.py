"""One damaged stream after the other, the same ones for the same seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_transfer.codecs.container import (
    Form,
    StreamHeader,
    read_header,
    read_sections,
)
from kv_transfer.codecs.contract import Codec, CodecError
from kv_transfer.codecs.registry import LOSSY, WITHOUT_PROFILE, make
from tests.support.kv_samples import DTYPES, PART, Geometry, kv_like, random_bits, sealed

SHAPES = ((1, 1, 1, 1), (2, 5, 2, 8), (1, 70, 1, 16), (1, 130, 4, 64))
"""Layers, tokens, heads, head_dim; the last is large enough for four tables a run."""
INTERESTING = (0, 1, 2, 4, 7, 8, 10, 11, 127, 128, 254, 255)


@dataclass(frozen=True)
class Sample:
    codec: Codec
    kv: NDArray[Any]
    header: StreamHeader
    stream: bytes
    sections: tuple[bytes, ...]


def samples() -> list[Sample]:
    found = []
    for dtype in DTYPES:
        for layers, tokens, heads, dim in SHAPES:
            geometry = Geometry(dtype, heads, dim)
            for kv in (kv_like(geometry, layers, tokens), random_bits(geometry, layers, tokens, 1)):
                found += [sample(make(name, geometry), kv) for name in (*WITHOUT_PROFILE, *LOSSY)]
    return found


def sample(codec: Codec, kv: NDArray[Any]) -> Sample:
    stream = bytes(codec.encode(kv, PART))
    header = read_header(stream)
    sections = tuple(bytes(s.data) for s in read_sections(stream, header))
    return Sample(codec, kv, header, stream, sections)


class Fuzzer:
    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._samples = samples()
        self._mutations: tuple[Callable[[bytes], bytes], ...] = (
            self._flip,
            self._set_byte,
            self._cut,
            self._grow,
            self._repeat,
            self._head,
            self._noise,
        )

    def run_one(self) -> str:
        """What came of it, for counting. Lets everything but CodecError through."""
        sample = self._rng.choice(self._samples)
        if self._rng.random() < 0.1:
            stream, kind = self._mutated(sample.stream), "damaged"
        else:
            limit = sample.header.layer_bytes
            sections = [
                self._mutated(s)[:limit] if self._rng.random() < 0.8 else s for s in sample.sections
            ]
            stream, kind = sealed(sample.header, sections, Form.CODED), "sealed"
        out = np.empty_like(sample.kv)
        try:
            sample.codec.decode(stream, PART, out)
        except CodecError:
            return f"{sample.codec.name} {kind}: refused"
        return f"{sample.codec.name} {kind}: decoded"

    def _mutated(self, data: bytes) -> bytes:
        for _ in range(self._rng.choice((1, 1, 1, 2, 4))):
            data = self._rng.choice(self._mutations)(data)
        return data

    def _flip(self, data: bytes) -> bytes:
        damaged = bytearray(data)
        for _ in range(self._rng.randint(1, 8)):
            if damaged:
                damaged[self._rng.randrange(len(damaged))] ^= 1 << self._rng.randrange(8)
        return bytes(damaged)

    def _set_byte(self, data: bytes) -> bytes:
        damaged = bytearray(data)
        if damaged:
            damaged[self._rng.randrange(len(damaged))] = self._rng.choice(INTERESTING)
        return bytes(damaged)

    def _cut(self, data: bytes) -> bytes:
        return data[: self._rng.randint(0, len(data))]

    def _grow(self, data: bytes) -> bytes:
        at = self._rng.randint(0, len(data))
        return data[:at] + self._rng.randbytes(self._rng.choice((1, 2, 4, 64))) + data[at:]

    def _repeat(self, data: bytes) -> bytes:
        begin = self._rng.randint(0, len(data))
        piece = data[begin : begin + self._rng.choice((1, 2, 4, 16, 256))]
        at = self._rng.randint(0, len(data))
        return data[:at] + piece + data[at + len(piece) :]

    def _head(self, data: bytes) -> bytes:
        """Lengths and counts stand in the first bytes, tables behind the bodies."""
        damaged = bytearray(data)
        for _ in range(self._rng.randint(1, 3)):
            place = self._rng.randrange(16)
            if place < len(damaged):
                damaged[place] = self._rng.choice((*INTERESTING, self._rng.randrange(256)))
        return bytes(damaged)

    def _noise(self, data: bytes) -> bytes:
        begin = self._rng.randint(0, len(data))
        end = min(len(data), begin + self._rng.choice((4, 32, 1024)))
        return data[:begin] + self._rng.randbytes(end - begin) + data[end:]
