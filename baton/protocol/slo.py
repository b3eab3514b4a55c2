"""Service-level formulas, defined once. Standard library only.

TTFT = arrival to first token.
TPOT = (last token time - first token time) / (n - 1).
TBT  = one gap between two tokens; the first of them (TBT[0]) also holds the KV hand-over.
Goodput = requests per second that met every limit (DistServe, section 2.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Slo:
    ttft_ms: float
    tpot_ms: float


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """One request as its client saw it; all times in seconds on one clock."""

    arrival_s: float
    token_times_s: tuple[float, ...]
    ok: bool = True

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """None below two tokens: there is no gap to speak of."""
        n = len(self.token_times_s)
        return None if n < 2 else (self.token_times_s[-1] - self.token_times_s[0]) / (n - 1)

    @property
    def tbt_s(self) -> list[float]:
        times = self.token_times_s
        return [b - a for a, b in pairwise(times)]

    def meets(self, slo: Slo) -> bool:
        if not self.ok or not self.token_times_s:
            return False
        tpot = self.tpot_s
        return self.ttft_s * 1e3 <= slo.ttft_ms and (tpot is None or tpot * 1e3 <= slo.tpot_ms)


def goodput_rps(requests: Iterable[RequestTimes], slo: Slo, duration_s: float) -> float:
    return sum(r.meets(slo) for r in requests) / duration_s


def percentile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between closest ranks, ``q`` in [0, 100]; NaN for no values."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * q / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)
