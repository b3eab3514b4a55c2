"""Small KV and codec profiles made from it, for tests that need no model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.calibrate.fit import Model, fit_profile
from cluster.calibrate.statistics import Gatherer, Observed
from cluster.calibrate.transform import fit_transform
from kv_transfer.codecs.contract import Array, Quality
from kv_transfer.codecs.lossy_profile import Level, Profile
from kv_transfer.codecs.lossy_reference import turn

AGES = np.array([0, 4, 16], np.int32)
LEVELS = (
    Level("kv1", Quality.HIGH, 2.0),
    Level("kv2", Quality.HIGH, 4.0),
    Level("kv3", Quality.MEDIUM, 8.0),
    Level("kv4", Quality.LOW, 16.0),
)


@dataclass(frozen=True, slots=True)
class Geometry:
    dtype: str = "bfloat16"
    num_kv_heads: int = 2
    head_dim: int = 16


class Source:
    """Draws KV of one made-up model: correlated channels of unlike sizes."""

    def __init__(self, geometry: Geometry, num_layers: int, num_groups: int, pairs: int) -> None:
        self.geometry, self.num_layers, self.num_groups = geometry, num_layers, num_groups
        rng = np.random.default_rng(11)
        width = geometry.num_kv_heads * geometry.head_dim // num_groups
        shape = (num_layers, 2, num_groups, width)
        self._mix = rng.normal(size=(*shape, width)) * np.geomspace(3, 0.01, width)
        self._mean = rng.normal(size=shape)
        self._felt = rng.normal(size=(*shape, width)) * np.geomspace(0.05, 2, width)
        frequencies = np.geomspace(1, 0.001, pairs) if pairs else np.zeros(1)
        self.inv_freq = np.tile(frequencies.astype(np.float32), (num_layers, 1))

    def observe(self, num_tokens: int, seed: int) -> Observed:
        """Laplace noise through the model's mixing, newest tokens felt ten times as much."""
        rng = np.random.default_rng(seed)
        shape = (*self._mean.shape[:2], num_tokens, *self._mean.shape[2:])
        draws = rng.laplace(size=shape)
        x = np.einsum("lktgc,lkgdc->lktgd", draws, self._mix) + self._mean[:, :, None]
        felt = np.einsum("lktgc,lkgdc->lktgd", rng.normal(size=shape), self._felt)
        felt[:, :, -AGES[1] :] *= 10
        return Observed(x.astype(np.float32), felt.astype(np.float32))

    def kv(self, num_tokens: int, seed: int) -> Array:
        """``[L, 2, T, heads, head_dim]`` as a cache holds it: keys turned, in its dtype."""
        g = self.geometry
        x = self.observe(num_tokens, seed).x
        x = x.reshape(self.num_layers, 2, num_tokens, g.num_kv_heads, g.head_dim)
        angle = np.arange(num_tokens, dtype=np.float32)[:, None] * self.inv_freq[0]
        for layer in x:
            layer[0] = turn(layer[0], np.cos(angle), np.sin(angle))
        return to_array(x, g.dtype)

    def profile(self) -> Profile:
        gatherer = Gatherer(AGES, 4)
        for seed in range(4):
            gatherer.add(self.observe(200, 100 + seed))
        stats = gatherer.finish()
        g = self.geometry
        model = Model("made-up", g.num_kv_heads, g.head_dim, self.inv_freq)
        return fit_profile(model, stats, fit_transform(stats), AGES, LEVELS)


def to_array(x: NDArray[np.float32], dtype: str) -> Array:
    """float32 to a layout's array, bfloat16 by cutting off."""
    if dtype == "float32":
        return np.ascontiguousarray(x, np.float32)
    if dtype == "float16":
        return x.astype(np.float16).view(np.uint16)
    return (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(np.uint16)


def to_float(kv: Array, dtype: str) -> NDArray[np.float32]:
    if dtype == "float32":
        return kv
    if dtype == "float16":
        return kv.view(np.float16).astype(np.float32)
    return (kv.astype(np.uint32) << 16).view(np.float32)
