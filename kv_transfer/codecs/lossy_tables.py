"""A profile's level made ready for coding: what every implementation of the lossy codecs reads.

Axes as in ``lossy_profile``, with R padded to whole vectors (``W``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_transfer.codecs.contract import CodecError, KvPart
from kv_transfer.codecs.lossy_profile import FRACTION, Profile
from kv_transfer.codecs.rans import RansTables

VECTOR = 8
PAGE_TOKENS = 4096

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
I32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class LayerTables:
    """One layer of a level.

    analysis: ``[2, G, C, W]`` whole numbers. multiplier: ``[2, G, A, W]``, from a product to
    quotients. synthesis: ``[2, G, W, C]``. factor: ``[2, G, A, C]``, from a sum of sixteenths to
    channels. rank: ``[2, G, A]``. table: ``[2, G, A, W]``. inv_freq: ``[P]``.
    """

    inv_freq: F32
    mean: F32
    grid: F32
    analysis: F32
    multiplier: F32
    synthesis: I32
    factor: F32
    rank: I32
    table: U8


@dataclass(frozen=True, slots=True)
class LevelTables:
    layers: tuple[LayerTables, ...]
    ages: I32
    rans: RansTables
    limit: I32
    shrink: I32


@dataclass(frozen=True, slots=True)
class Segments:
    """Runs of tokens of one age class, in order of tokens. kind, end: ``[S]``; a run ends
    before token ``end`` of the rectangle."""

    kind: I32
    end: I32


def level_tables(profile: Profile, place: int) -> LevelTables:
    step = np.float32(profile.levels[place].step)
    layers = []
    for layer in range(profile.num_layers):
        gain = profile.gain[layer][:, None, :, None]
        unit = _padded(profile.unit[layer], 2)
        scale = profile.scale[layer][:, :, None, :]
        layers.append(
            LayerTables(
                inv_freq=profile.inv_freq[layer],
                mean=profile.mean[layer],
                grid=profile.grid[layer],
                analysis=_padded(profile.analysis[layer], 3).astype(np.float32),
                multiplier=unit[:, :, None, :] * gain / step,
                synthesis=_padded(profile.synthesis[layer], 2).astype(np.int32),
                factor=scale * step / (np.float32(FRACTION) * gain),
                rank=profile.rank[place, layer].astype(np.int32),
                table=_padded(profile.table[place, layer], 3),
            )
        )
    return LevelTables(
        tuple(layers),
        profile.ages,
        RansTables(profile.frequencies.astype(np.int64)),
        profile.limit.astype(np.int32),
        profile.shrink.astype(np.int32),
    )


def layers_of(level: LevelTables, part: KvPart, num_layers: int) -> tuple[LayerTables, ...]:
    """Raises CodecError for layers that the profile does not have."""
    end = part.layer_start + num_layers
    if not 0 <= part.layer_start < end <= len(level.layers):
        known = len(level.layers)
        raise CodecError(f"KV of layers {part.layer_start} to {end}, the profile has {known}")
    return level.layers[part.layer_start : end]


def segments(ages: I32, part: KvPart, num_tokens: int) -> Segments:
    age = part.num_tokens_total - 1 - np.arange(part.token_start, part.token_start + num_tokens)
    kind = np.searchsorted(ages, np.maximum(age, 0), side="right") - 1
    last = np.flatnonzero(np.append(kind[1:] != kind[:-1], True))
    return Segments(kind[last].astype(np.int32), (last + 1).astype(np.int32))


class Turns:
    """cos and sin of the angles by which keys were turned, kept from use to use."""

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, int], tuple[F32, F32]] = {}

    def of(self, layer: LayerTables, part: KvPart, num_tokens: int) -> tuple[F32, F32]:
        """Each ``[T, P]``: float32 of the float64 function of the float32 angle, so that every
        implementation gets the same."""
        first, last = part.token_start, part.token_start + num_tokens - 1
        pages = range(first // PAGE_TOKENS, last // PAGE_TOKENS + 1)
        parts = [self._page(layer.inv_freq, page) for page in pages]
        begin = first - pages.start * PAGE_TOKENS
        cos, sin = (
            np.concatenate(side) if len(side) > 1 else side[0] for side in zip(*parts, strict=True)
        )
        return cos[begin : begin + num_tokens], sin[begin : begin + num_tokens]

    def _page(self, inv_freq: F32, page: int) -> tuple[F32, F32]:
        key = (inv_freq.tobytes(), page)
        if key not in self._known:
            # Two threads may both make a page; it is the same.
            position = np.arange(PAGE_TOKENS, dtype=np.float32) + np.float32(page * PAGE_TOKENS)
            angle = (position[:, None] * inv_freq).astype(np.float64)
            self._known[key] = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        return self._known[key]


def symbol_tables(layer: LayerTables, runs: Segments) -> U8:
    """Table of every symbol of a section, in the order of coding: K then V, groups, runs,
    tokens, components."""
    parts: list[NDArray[Any]] = []
    lengths = np.diff(runs.end, prepend=0)
    for kind, group in np.ndindex(layer.rank.shape[:2]):
        for age, length in zip(runs.kind, lengths, strict=True):
            row = layer.table[kind, group, age, : layer.rank[kind, group, age]]
            parts.append(np.tile(row, length))
    return np.concatenate(parts)


def _padded(array: NDArray[Any], axis: int) -> NDArray[Any]:
    missing = -array.shape[axis] % VECTOR
    pads = [(0, missing if i == axis else 0) for i in range(array.ndim)]
    return np.ascontiguousarray(np.pad(array, pads))
