"""Static tables: few enough to stay near the arithmetic, each shared by many components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.calibrate.statistics import F64, Statistics
from cluster.calibrate.transform import Transform
from kv_transfer.codecs.lossy_profile import ESCAPE, FRACTION, NUM_SYMBOLS, ZERO_SYMBOL
from kv_transfer.codecs.rans import PROB_SCALE, normalise

NUM_TABLES = 96
NUM_ROUNDS = 4
RARE = 0.5 / PROB_SCALE
"""Magnitudes beyond which less than this part lies are escaped."""
LEAST = 1 / 65536


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one level, by place ``[L, 2, G, A, C]``. magnitude: ``[..., 129]``, how often quotients
    had each magnitude, the last for all beyond. excess: ``[..., 2]``, how far values lay beyond
    the quotient's magnitude in sum, for 1 and above."""

    magnitude: F64
    excess: F64


@dataclass(frozen=True, slots=True)
class Tables:
    """See ``Profile``; table: ``[V, L, 2, G, A, C]``."""

    table: NDArray[np.uint8]
    frequencies: NDArray[np.uint16]
    limit: NDArray[np.uint8]
    shrink: NDArray[np.uint8]


def count_quotients(stats: Statistics, transform: Transform, step: float) -> Counts:
    """What rounding the sampled rows gives."""
    layers, _, groups, width = stats.mean.shape
    num_classes = stats.gain.shape[2]
    bins = ZERO_SYMBOL + 2
    magnitude = np.zeros((layers, 2, groups, num_classes, width, bins))
    excess = np.zeros((layers, 2, groups, num_classes, width, 2))
    offset = np.arange(width) * bins
    for layer, kind, group in np.ndindex(layers, 2, groups):
        place = (layer, kind, group)
        x = stats.rows[layer, kind, :, group] - stats.mean[place].astype(np.float32)
        y = x @ transform.real(place).astype(np.float32)
        for age in range(num_classes):
            value = np.abs(y[stats.age_class == age]) * (stats.gain[layer, kind, age] / step)
            quotient = np.rint(value)
            binned = np.minimum(quotient, bins - 1).astype(np.int64)
            flat = np.bincount((binned + offset).ravel(), minlength=width * bins)
            magnitude[*place, age] = flat.reshape(width, bins)
            rest = value - quotient
            for which, chosen in enumerate((quotient == 1, quotient > 1)):
                excess[*place, age, :, which] = (rest * chosen).sum(0)
    return Counts(magnitude, excess)


def fit_tables(counted: Sequence[Counts], ranks: NDArray[np.int64], share: F64) -> Tables:
    """One table for each component that any level sends, out of ``NUM_TABLES``.

    ranks: ``[V, L, 2, G, A]``. share: how often an age class occurs; sampled rows are even.
    """
    counts = np.stack([c.magnitude for c in counted])
    is_sent = np.arange(counts.shape[5]) < ranks[..., None]
    weight = np.broadcast_to(share[:, None], is_sent.shape)[is_sent]
    counts, excess = counts[is_sent], np.stack([c.excess for c in counted])[is_sent]
    rates = counts / counts.sum(-1, keepdims=True)
    mass = rates * weight[:, None]
    chosen = _cluster(rates, mass)
    table = np.zeros(is_sent.shape, np.uint8)
    table[is_sent] = chosen
    num_tables = int(chosen.max(initial=0)) + 1
    pooled = np.stack([mass[chosen == n].sum(0) + 1e-12 for n in range(num_tables)])
    frequencies, limit = _frequencies(pooled)
    shrink = np.stack(
        [_shrink(counts[chosen == n], excess[chosen == n]) for n in range(num_tables)]
    )
    return Tables(table, frequencies, limit, shrink)


def _cluster(rates: F64, mass: F64) -> NDArray[np.int64]:
    """Components whose tables are alike: each goes where it costs the fewest bits, tables become
    the mean of theirs, a few times over. First by mean magnitude."""
    order = np.argsort(rates @ np.arange(rates.shape[1]), kind="stable")
    chosen = np.empty(len(rates), np.int64)
    chosen[order] = np.arange(len(rates)) * NUM_TABLES // max(1, len(rates))
    for _ in range(NUM_ROUNDS):
        names, chosen = np.unique(chosen, return_inverse=True)
        pooled = np.stack([mass[chosen == n].sum(0) for n in range(len(names))])
        pooled /= pooled.sum(1, keepdims=True)
        chosen = (rates @ -np.log2(np.maximum(pooled, 1e-6)).T).argmin(1)
    return np.unique(chosen, return_inverse=True)[1]


def _frequencies(pooled: F64) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """``[N, S]`` and the limits. Both signs of a magnitude are taken to be as likely."""
    counts = np.zeros((len(pooled), NUM_SYMBOLS))
    limit = np.zeros(len(pooled), np.uint8)
    for n, row in enumerate(pooled / pooled.sum(1, keepdims=True)):
        beyond = row.sum() - np.cumsum(row)
        is_rare = beyond[1 : ZERO_SYMBOL + 1] < RARE
        last = 1 + int(is_rare.argmax()) if is_rare.any() else ZERO_SYMBOL
        half = np.maximum(row[1 : last + 1] / 2, LEAST)
        limit[n] = last
        counts[n, ZERO_SYMBOL] = max(row[0], LEAST)
        counts[n, ZERO_SYMBOL + 1 : ZERO_SYMBOL + last + 1] = half
        counts[n, ZERO_SYMBOL - last : ZERO_SYMBOL] = half[::-1]
        counts[n, ESCAPE] = max(beyond[last], LEAST)
    return normalise(counts).astype(np.uint16), limit


def _shrink(counts: F64, excess: F64) -> NDArray[np.uint8]:
    """``[2]`` of one table: means of what rounding cut off, in sixteenths."""
    hits = np.array([counts[:, 1].sum(), counts[:, 2:].sum()])
    mean = excess.sum(0) / (hits + FRACTION)
    sixteenths: NDArray[np.uint8] = np.rint(-mean * FRACTION).clip(0, FRACTION - 1).astype(np.uint8)
    return sixteenths
