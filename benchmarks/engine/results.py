"""From windows to figures: best and median, memory, ratios and bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import msgspec

from benchmarks.engine.cases import BARS, MEMORY_BAR
from benchmarks.engine.measure import Window
from benchmarks.engine.variants import OURS


class Speed(msgspec.Struct, frozen=True):
    """Tokens per second of one variant on one case, over the repeats."""

    engine: str
    variant: str
    case: str
    median_tokens_per_s: float
    best_tokens_per_s: float
    repeats_tokens_per_s: tuple[float, ...]
    most_foreign_cpu: float
    num_noisy: int


class Memory(msgspec.Struct, frozen=True):
    """Resident bytes of one variant. peak: the most ever, after the cases. idle: before anything
    was loaded. pool_filled: every block of the pool was written, so all of it is in the peak."""

    engine: str
    variant: str
    weights_bytes: int
    pool_bytes: int
    idle_bytes: int
    peak_bytes: int
    pool_filled: bool

    @property
    def ratio(self) -> float:
        return self.peak_bytes / (self.weights_bytes + self.pool_bytes)

    @property
    def ratio_without_idle(self) -> float:
        """The same without what the interpreter and its libraries take by themselves."""
        return (self.peak_bytes - self.idle_bytes) / (self.weights_bytes + self.pool_bytes)


class Ratio(msgspec.Struct, frozen=True):
    """Ours by a peer's, each in its fastest variant for this case, by median and by best.

    bar, passed: of the median; null where nothing is asked.
    """

    case: str
    peer: str
    our_variant: str
    peer_variant: str
    of_medians: float
    of_bests: float
    bar: float | None
    passed: bool | None


class MemoryVerdict(msgspec.Struct, frozen=True):
    variant: str
    ratio: float
    ratio_without_idle: float
    bar: float
    passed: bool


def speeds(windows: Sequence[Window], engine_of: Mapping[str, str]) -> list[Speed]:
    """In order of appearance; the trial round is left out."""
    of_pair: dict[tuple[str, str], list[Window]] = {}
    for window in windows:
        if window.repeat >= 0:
            of_pair.setdefault((window.variant, window.case), []).append(window)
    found = []
    for (variant, case), taken in of_pair.items():
        values = tuple(w.tokens_per_s for w in taken)
        found.append(
            Speed(
                engine=engine_of[variant],
                variant=variant,
                case=case,
                median_tokens_per_s=median(values),
                best_tokens_per_s=max(values),
                repeats_tokens_per_s=values,
                most_foreign_cpu=max(w.cpu["foreign"] for w in taken),
                num_noisy=sum(w.is_noisy for w in taken),
            )
        )
    return found


def fastest(found: Sequence[Speed], engine: str, case: str) -> Speed | None:
    """The variant of an engine that has the best median."""
    its = [s for s in found if (s.engine, s.case) == (engine, case)]
    return max(its, key=lambda s: s.median_tokens_per_s, default=None)


def ratios(found: Sequence[Speed], peers: Sequence[str], cases: Sequence[str]) -> list[Ratio]:
    made = []
    for peer in peers:
        for case in cases:
            ours, its = fastest(found, OURS, case), fastest(found, peer, case)
            if ours is None or its is None:
                continue
            bar = BARS.get((peer, case))
            of_medians = ours.median_tokens_per_s / its.median_tokens_per_s
            made.append(
                Ratio(
                    case=case,
                    peer=peer,
                    our_variant=ours.variant,
                    peer_variant=its.variant,
                    of_medians=of_medians,
                    of_bests=ours.best_tokens_per_s / its.best_tokens_per_s,
                    bar=bar,
                    passed=None if bar is None else of_medians >= bar,
                )
            )
    return made


def memory_verdicts(memory: Sequence[Memory]) -> list[MemoryVerdict]:
    """Of our variants whose pool was filled."""
    return [
        MemoryVerdict(m.variant, m.ratio, m.ratio_without_idle, MEMORY_BAR, m.ratio <= MEMORY_BAR)
        for m in memory
        if m.engine == OURS and m.pool_filled
    ]


def missed(
    made: Sequence[Ratio],
    verdicts: Sequence[MemoryVerdict],
    peers: Sequence[str],
    cases: Sequence[str],
) -> list[str]:
    """Sentences about bars that were missed or, of ``peers``, could not be judged; empty when all
    were met."""
    found = [
        f"{r.case}: {r.of_medians:.2f} x {r.peer}, {r.bar:g} wanted"
        for r in made
        if r.passed is False
    ]
    judged = {(r.peer, r.case) for r in made}
    found += [
        f"{case}: {peer} was not measured"
        for peer, case in BARS
        if peer in peers and case in cases and (peer, case) not in judged
    ]
    found += [
        f"memory of {v.variant}: {v.ratio:.2f} x weights and pool, {v.bar:g} allowed"
        for v in verdicts
        if not v.passed
    ]
    return found
