"""What is gathered of a model's KV while it reads: moments, sensitivities, some rows.

Axes as in ``kv_transfer.codecs.lossy_profile``. Keys are turned back to position 0 throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

MAX_GAIN = 32.0
ROWS_PER_CLASS = 6144
COMMON = 0.9999
"""Part of a channel's values that the grid must reach."""


@dataclass(frozen=True, slots=True)
class Observed:
    """One context. x, gradient: ``[L, 2, T, G, C]``; the gradient is that of the continuation's
    loss in nats, summed over the continuation, by each element of the cached KV."""

    x: F32
    gradient: F32


@dataclass(frozen=True, slots=True)
class Statistics:
    """mean: ``[L, 2, G, C]``. spread: how far common values lie from it. covariance:
    ``[L, 2, G, C, C]``. sensitivity: mean outer products of gradients, tokens of all ages
    brought to the oldest class by ``gain`` (``[L, 2, A]``).
    rows: ``[L, 2, n, G, C]``, spread over contexts; age_class: ``[n]``, theirs.
    age_share: ``[A]``, the part of all tokens that has each class.
    """

    mean: F64
    spread: F64
    covariance: F64
    sensitivity: F64
    gain: F64
    rows: F32
    age_class: NDArray[np.int64]
    age_share: F64


def classes_of(num_tokens: int, ages: NDArray[np.int32]) -> NDArray[np.int64]:
    """Age class of each token of a prompt, ``[T]``."""
    age = np.arange(num_tokens - 1, -1, -1)
    return np.searchsorted(ages, age, side="right") - 1


class Gatherer:
    """Adds up contexts one at a time; memory does not grow with their number."""

    def __init__(self, ages: NDArray[np.int32], num_contexts: int, seed: int = 0) -> None:
        self._ages = ages
        self._rows_of_class = -(-ROWS_PER_CLASS // num_contexts)
        self._rng = np.random.default_rng(seed)
        self._counts = np.zeros(len(ages))
        self._sum: F64 | None = None
        self._outer: F64
        self._felt: F64
        self._rows: list[F32] = []
        self._row_classes: list[NDArray[np.int64]] = []

    def add(self, context: Observed) -> None:
        layers, _, num_tokens, groups, width = context.x.shape
        if self._sum is None:
            self._sum = np.zeros((layers, 2, groups, width))
            self._outer = np.zeros((layers, 2, groups, width, width))
            self._felt = np.zeros((len(self._ages), layers, 2, groups, width, width))
        classes = classes_of(num_tokens, self._ages)
        self._sum += context.x.sum(2, dtype=np.float64)
        self._outer += _outer(context.x)
        picked = []
        for k in range(len(self._ages)):
            mine = np.flatnonzero(classes == k)
            self._counts[k] += len(mine)
            self._felt[k] += _outer(context.gradient[:, :, mine])
            picked.append(self._rng.permutation(mine)[: self._rows_of_class])
        chosen = np.concatenate(picked)
        self._rows.append(context.x[:, :, chosen])
        self._row_classes.append(classes[chosen])

    def finish(self) -> Statistics:
        """Contexts must have been added, and the longest have tokens of every class."""
        assert self._sum is not None
        assert (self._counts > 0).all(), self._counts
        total = self._counts.sum()
        mean: F64 = self._sum / total
        covariance: F64 = self._outer / total - mean[..., :, None] * mean[..., None, :]
        gain = self._gains(np.einsum("lkgcc->lkgc", covariance))
        weights = 1 / (gain**2 * total)
        sensitivity: F64 = np.einsum("alkgij,lka->lkgij", self._felt, weights)
        rows = np.concatenate(self._rows, axis=2)
        deviation = np.abs(rows - mean[:, :, None].astype(np.float32))
        spread = np.quantile(deviation, COMMON, axis=2).astype(np.float64) + 1e-6
        return Statistics(
            mean,
            spread,
            covariance,
            sensitivity,
            gain,
            rows,
            np.concatenate(self._row_classes),
            self._counts / total,
        )

    def _gains(self, variance: F64) -> F64:
        """How much finer a class should be rounded: the root of how much more the loss feels of
        a typical error there, never falling towards newer tokens."""
        felt = np.einsum("alkgcc,lkgc->lka", self._felt, variance) / self._counts
        relative = felt / np.maximum(felt[:, :, -1:], 1e-300)
        ascending = np.maximum.accumulate(relative[:, :, ::-1], axis=2)[:, :, ::-1]
        gain: F64 = np.clip(np.sqrt(ascending), 1.0, MAX_GAIN)
        return gain


def _outer(values: F32) -> F64:
    """``[L, 2, T, G, C] -> [L, 2, G, C, C]``: sums over tokens of outer products."""
    by_group = np.moveaxis(values, 3, 2).astype(np.float64)
    outer: F64 = np.swapaxes(by_group, -1, -2) @ by_group
    return outer
