"""Means with paired bootstrap intervals, and what one front costs where another is as good."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.kv.quality import Sample

NUM_DRAWS = 2000
LOW, HIGH = 2.5, 97.5

F64 = NDArray[np.float64]


class Interval(msgspec.Struct, frozen=True):
    """Of 95 %."""

    mean: float
    low: float
    high: float


class Row(msgspec.Struct, frozen=True):
    """perplexity_percent: change against the KV as it was. agreement: of the likeliest token."""

    method: str
    num_tokens: int
    num_contexts: int
    bits: float
    bits_without_tables: float
    perplexity_percent: Interval
    divergence: Interval
    agreement: Interval


class Comparison(msgspec.Struct, frozen=True):
    """What ``method`` costs as a part of what ``baseline`` costs where its front has the same
    perplexity; ``beyond`` where the method is better than the finest point of that front, which
    is what it is then compared with."""

    method: str
    baseline: str
    num_tokens: int
    ratio: Interval
    ratio_without_tables: float
    beyond: bool


class Table:
    """Samples of one length as matrices, contexts in the same order for every method."""

    def __init__(self, samples: Sequence[Sample], num_tokens: int) -> None:
        mine = [s for s in samples if s.num_tokens == num_tokens]
        self.num_tokens = num_tokens
        self.methods = list(dict.fromkeys(s.method for s in mine))
        seen = [{s.context for s in mine if s.method == m} for m in self.methods]
        self.contexts = sorted(set.intersection(*seen)) if seen else []
        place = {c: i for i, c in enumerate(self.contexts)}
        self._of: dict[str, list[Sample]] = {m: [] for m in self.methods}
        for s in sorted(mine, key=lambda s: s.context):
            if s.context in place:
                self._of[s.method].append(s)
        rng = np.random.default_rng(5)
        self._draws = rng.integers(0, len(self.contexts), (NUM_DRAWS, len(self.contexts)))

    def column(self, method: str, field: str) -> F64:
        return np.array([getattr(s, field) for s in self._of[method]], np.float64)

    def row(self, method: str) -> Row:
        loss = self.column(method, "loss")
        return Row(
            method=method,
            num_tokens=self.num_tokens,
            num_contexts=len(self.contexts),
            bits=float(self.column(method, "bits").mean()),
            bits_without_tables=float(self.column(method, "bits_without_tables").mean()),
            perplexity_percent=_interval(_percent(loss.mean()), _percent(self._means(loss))),
            divergence=self._mean(method, "divergence"),
            agreement=self._mean(method, "agreement"),
        )

    def compare(self, method: str, baseline: str, front: Sequence[str]) -> Comparison:
        """front: the baseline's methods. Each draw of contexts gives all of them anew."""
        losses = np.stack([self._means(self.column(m, "loss")) for m in front])
        bits = np.stack([self._means(self.column(m, "bits")) for m in front])
        own_loss = self._means(self.column(method, "loss"))
        own_bits = self._means(self.column(method, "bits"))
        ratios = np.array(
            [
                own_bits[i] / _bits_at(own_loss[i], losses[:, i], bits[:, i])
                for i in range(NUM_DRAWS)
            ]
        )
        means = np.array([self.column(m, "loss").mean() for m in front])
        wholes = np.array([self.column(m, "bits").mean() for m in front])
        free = np.array([self.column(m, "bits_without_tables").mean() for m in front])
        loss, size = self.column(method, "loss").mean(), self.column(method, "bits").mean()
        return Comparison(
            method=method,
            baseline=baseline,
            num_tokens=self.num_tokens,
            ratio=_interval(size / _bits_at(loss, means, wholes), ratios),
            ratio_without_tables=float(size / _bits_at(loss, means, free)),
            beyond=bool(loss < means.min()),
        )

    def _means(self, values: F64) -> F64:
        """``[NUM_DRAWS]``."""
        means: F64 = values[self._draws].mean(1)
        return means

    def _mean(self, method: str, field: str) -> Interval:
        values = self.column(method, field)
        return _interval(values.mean(), self._means(values))


def _percent(loss: F64) -> F64:
    percent: F64 = 100 * np.expm1(loss)
    return percent


def _interval(mean: float | F64, draws: F64) -> Interval:
    low, high = np.percentile(draws, [LOW, HIGH])
    return Interval(float(mean), float(low), float(high))


def _bits_at(loss: float, losses: F64, bits: F64) -> float:
    """Size of a front where it loses ``loss``, between its points; its ends beyond them."""
    order = np.argsort(losses)
    return float(np.interp(loss, losses[order], bits[order]))
