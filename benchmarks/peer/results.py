"""From windows to figures, ratios and bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import msgspec

from baton.protocol.slo import percentile
from benchmarks.peer.cases import BAR, CASES, FIGURES, PREDICTED_RPS, RPS_BARS, Case
from benchmarks.peer.measure import Window
from benchmarks.peer.systems import SHAPES, System
from benchmarks.peer.transfer import Transfer


class Summary(msgspec.Struct, frozen=True):
    """One system on one case, over the repeats: latencies of all their requests together,
    requests/s as the median of the repeats."""

    system: str
    case: str
    num_requests: int
    ttft_p50_ms: float
    ttft_p90_ms: float
    tpot_p50_ms: float
    tpot_p90_ms: float
    e2e_p50_ms: float
    e2e_p90_ms: float
    rps: float
    rps_of_repeats: tuple[float, ...]
    most_foreign_cpu: float
    num_noisy: int


class Ratio(msgspec.Struct, frozen=True):
    """Ours beside one start of the peer in the same shape; above 1 ours is better.

    bar, passed: null where nothing is asked. predicted: null where nothing was.
    """

    start: str
    shape: str
    case: str
    figure: str
    value: float
    bar: float | None
    passed: bool | None
    predicted: float | None


class TransferVerdict(msgspec.Struct, frozen=True):
    """Our median beside the peer's mean, which is all that its metrics tell."""

    peer: str
    our_ms: float
    peer_ms: float
    passed: bool


def summarise(windows: Sequence[Window], systems: Sequence[System]) -> list[Summary]:
    """In the order of cases, then of systems."""
    found = []
    for case in CASES:
        for system in systems:
            taken = [w for w in windows if (w.system, w.case) == (system.name, case.name)]
            if taken:
                found.append(_summary(taken))
    return found


def _summary(taken: Sequence[Window]) -> Summary:
    requests = [request for window in taken for request in window.requests]
    ttft, tpot, e2e = (
        [getattr(request, f"{name}_ms") for request in requests] for name in FIGURES[:3]
    )
    return Summary(
        system=taken[0].system,
        case=taken[0].case,
        num_requests=len(requests),
        ttft_p50_ms=percentile(ttft, 50),
        ttft_p90_ms=percentile(ttft, 90),
        tpot_p50_ms=percentile(tpot, 50),
        tpot_p90_ms=percentile(tpot, 90),
        e2e_p50_ms=percentile(e2e, 50),
        e2e_p90_ms=percentile(e2e, 90),
        rps=median(w.rps for w in taken),
        rps_of_repeats=tuple(w.rps for w in taken),
        most_foreign_cpu=max(w.cpu["foreign"] for w in taken),
        num_noisy=sum(w.is_noisy for w in taken),
    )


def ratios(
    summaries: Sequence[Summary], ours: Sequence[System], peers: Sequence[System]
) -> list[Ratio]:
    of_pair = {(s.system, s.case): s for s in summaries}
    made = []
    for shape in SHAPES:
        for peer in peers:
            for our in ours:
                if our.shape != shape or peer.shape != shape:
                    continue
                for case in CASES:
                    one = of_pair.get((our.name, case.name))
                    other = of_pair.get((peer.name, case.name))
                    if one is not None and other is not None:
                        made += _ratios(one, other, case, peer)
    return made


def _ratios(one: Summary, other: Summary, case: Case, peer: System) -> list[Ratio]:
    values = {
        "ttft": _over(other.ttft_p50_ms, one.ttft_p50_ms),
        "tpot": _over(other.tpot_p50_ms, one.tpot_p50_ms),
        "e2e": _over(other.e2e_p50_ms, one.e2e_p50_ms),
        "rps": _over(one.rps, other.rps),
    }
    made = []
    for figure in FIGURES:
        bar, predicted = None, None
        if peer.shape == "1P+1D":
            bar = BAR
            if figure == "rps":
                bar = RPS_BARS.get((peer.start, case.concurrency), BAR)
                predicted = PREDICTED_RPS.get((peer.start, case.name))
        passed = None if bar is None else values[figure] >= bar
        made.append(
            Ratio(peer.start, peer.shape, case.name, figure, values[figure], bar, passed, predicted)
        )
    return made


def transfer_verdicts(transfers: Sequence[Transfer], ours: str) -> list[TransferVerdict]:
    own = next((t for t in transfers if t.system == ours), None)
    if own is None or own.median_ms is None:
        return []
    return [
        TransferVerdict(t.system, own.median_ms, t.mean_ms, own.median_ms <= t.mean_ms)
        for t in transfers
        if t.system != ours
    ]


def missed(made: Sequence[Ratio], verdicts: Sequence[TransferVerdict]) -> list[str]:
    """Sentences about bars that were missed; empty when all were met."""
    found = [
        f"{r.case}, {r.figure}: {r.value:.2f} x vLLM {r.start} {r.shape}, {r.bar:g} wanted"
        for r in made
        if r.passed is False
    ]
    found += [
        f"transfer: {v.our_ms:.1f} ms, {v.peer} takes {v.peer_ms:.1f} ms"
        for v in verdicts
        if not v.passed
    ]
    if not made:
        found.append("vLLM was not measured")
    return found


def _over(value: float, base: float) -> float:
    return value / base if base else math.nan
