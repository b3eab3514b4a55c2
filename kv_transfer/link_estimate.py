"""How fast a link is, from when frames were sent and when the peer said they were written. Pure.

A grid of rates, each of which predicts every answer: the link takes a frame when it was sent and
the one before is over, the peer decodes one after the other, and the way there and back takes
what it took at least so far. A rate loses credit by how far it was off. So an answer tells about
the link only what it can: a small frame, or one that waited for its encoder or decoder, leaves
all rates standing that would have been fast enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

SLOWEST, FASTEST, NUM_RATES = 1e5, 2e10, 96
"""Coded bytes a second."""
PRIOR = 125e6
PRIOR_WEIGHT = 0.05
"""Nats that a rate lacks for each factor of e between it and the prior, squared."""
LATENCY_UNIT_S = 1e-3
"""A rate that needs so much latency to be right loses a part of a nat."""
NOISE_S, NOISE_PART = 2e-4, 0.05
"""Of an answer's time, whatever the link."""
MAX_DEBT = 12.0
"""Nats below the best rate: what a link that changed must make up for."""
DEBT_AFTER_IDLE, IDLE_S = 6.0, 5.0
NEAR = 1.5
"""Nats: rates so near the best are as good as it; the estimate is their middle."""
MAX_GROWTH = 4.0
"""Of the estimate by one answer."""
LATENCY_RISE = 0.03
SUSPICION_S, SUSPICION_PART = 5e-3, 2.0
"""A frame that takes longer than this, and so many times as long as it should, is believed before
it has arrived: the link is at most so many times as fast as it."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """Frames that left one after the other. decode_s: of the peer, for all of them."""

    num_coded: int
    sent_at: float
    decode_s: float


class LinkEstimate:
    def __init__(self, prior: float = PRIOR) -> None:
        self._rates: F64 = np.geomspace(SLOWEST, FASTEST, NUM_RATES)
        self._log_rates: F64 = np.log(self._rates)
        self._seconds_per_byte: F64 = 1.0 / self._rates
        self._credit: F64 = -PRIOR_WEIGHT * np.log(self._rates / prior) ** 2
        self._latency_s: F64 = np.zeros(NUM_RATES)
        """By rate: the least that the answers so far leave for it."""
        self._heard_at = float("-inf")
        self._decode_s = 0.0
        self._value = prior

    @property
    def is_known(self) -> bool:
        return self._heard_at > float("-inf")

    @property
    def latency_s(self) -> float:
        """There and back, without the frame's own time."""
        return float(self._latency_s[int(self._credit.argmax())]) if self.is_known else 1e-3

    @property
    def last_done_at(self) -> tuple[float, float]:
        """When the link, and the decoder, were done with the frames heard of last."""
        decoded_at = self._heard_at - self.latency_s
        return decoded_at - self._decode_s, decoded_at

    def delivered(self, what: Delivery, now: float) -> None:
        """Heard now."""
        if self.is_known and now - self._heard_at > IDLE_S:
            self._credit = np.maximum(self._credit, -DEBT_AFTER_IDLE)
        rest = now - self._expected_without_latency(what)
        known = self._latency_s
        if not self.is_known:
            known = np.maximum(rest, 0.0)
            self._credit = self._credit - np.log1p(known / LATENCY_UNIT_S)
        self._credit = self._charged(rest - known, now - what.sent_at)
        rise = LATENCY_RISE * np.maximum(rest - known, 0.0)
        self._latency_s = np.maximum(np.minimum(known + rise, rest), 0.0)
        self._heard_at, self._decode_s = now, what.decode_s
        self._value = min(self._middle(self._credit), MAX_GROWTH * self._value)

    def bytes_per_s(self, now: float, oldest: Delivery | None) -> float:
        """oldest: on its way, with its decoding as expected: being late is evidence too."""
        if oldest is None or not self.is_known:
            return self._value
        best = int(self._credit.argmax())
        expected = float(self._expected_without_latency(oldest)[best]) + self.latency_s
        took = now - max(oldest.sent_at, self._heard_at) - self.latency_s - oldest.decode_s
        if now - expected < SUSPICION_S or took < SUSPICION_PART * oldest.num_coded / self._value:
            return self._value
        return min(self._value, SUSPICION_PART * oldest.num_coded / took)

    def _expected_without_latency(self, what: Delivery) -> F64:
        """When it would be heard of, by rate."""
        took: F64 = what.num_coded * self._seconds_per_byte
        if self._heard_at <= what.sent_at:
            return what.sent_at + took + what.decode_s
        before: F64 = self._heard_at - self._latency_s
        started = np.maximum(what.sent_at, before - self._decode_s)
        expected: F64 = np.maximum(started + took, before) + what.decode_s
        return expected

    def _charged(self, error_s: F64, delay_s: float) -> F64:
        noise = NOISE_S + NOISE_PART * delay_s
        credit: Any = self._credit - np.log1p((error_s / noise) ** 2)
        charged: F64 = np.maximum(credit - credit.max(), -MAX_DEBT)
        return charged

    def _middle(self, credit: F64) -> float:
        near = credit >= credit.max() - NEAR
        weights = np.exp(credit[near])
        return math.exp(float(weights @ self._log_rates[near]) / float(weights.sum()))
