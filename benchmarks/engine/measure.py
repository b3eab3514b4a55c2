"""The run: every engine in turn, case by case, over and over, and who else used the processors."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from benchmarks.cpu import shares, snapshot
from benchmarks.engine.cases import Case, batches
from benchmarks.engine.engine_process import EngineFailed

MUCH_FOREIGN_CPU = 0.05
WATCH_S = 0.25
BATCHES_AT_MOST = 24
WARM_STEPS = 4
WINDOW_TIMEOUT_S = 300.0
CLOSE_TO_BEST = 0.75
"""A start mode or dtype slower than this share of its engine's best in the trial round has no
chance to be the best one, and is not asked again for that case."""


class Measured(Protocol):
    name: str

    @property
    def pids(self) -> tuple[int, ...]: ...

    async def ask(self, question: Mapping[str, Any], timeout_s: float) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Contender:
    """A variant that stands ready. engine: what it is a variant of. required: when it fails the
    run is over; any other is left out from then on."""

    engine: str
    process: Measured
    required: bool = False


class Window(msgspec.Struct, frozen=True):
    """One engine on one case, once. rounds: ``(tokens, timed seconds)``. cpu: shares of the
    machine. repeat: -1 in the trial round. attempts: how often it took to be left alone."""

    variant: str
    case: str
    repeat: int
    rounds: tuple[tuple[int, float], ...]
    cpu: dict[str, float]
    attempts: int

    @property
    def tokens_per_s(self) -> float:
        return sum(t for t, _ in self.rounds) / sum(s for _, s in self.rounds)

    @property
    def is_noisy(self) -> bool:
        return self.cpu["foreign"] > MUCH_FOREIGN_CPU


@dataclass(slots=True)
class Patience:
    """How long the whole run may wait for others to leave the processors alone.

    left_s: of waiting before windows. attempts: of one window, the first one included.
    """

    left_s: float
    attempts: int
    sleep: Callable[[float], Awaitable[None]] = field(default=asyncio.sleep)

    async def wait_for_quiet(self) -> None:
        while self.left_s > 0:
            before = snapshot({"own": (os.getpid(),)})
            await self.sleep(WATCH_S)
            self.left_s -= WATCH_S
            if shares(before, snapshot({"own": (os.getpid(),)}))["foreign"] <= MUCH_FOREIGN_CPU:
                return


async def take_window(
    contender: Contender,
    idle: Sequence[Contender],
    case: Case,
    *,
    repeat: int,
    seed: int,
    window_s: float,
    patience: Patience,
) -> Window:
    """Repeated while others used the machine, as patience allows; the quietest attempt counts."""
    question = {
        "op": case.op,
        "batches": batches(case, BATCHES_AT_MOST, seed, repeat),
        "window_s": window_s,
        "steps": case.steps,
        "warm_steps": WARM_STEPS,
    }
    groups = {
        "engine": contender.process.pids,
        "idle_engines": tuple(pid for other in idle for pid in other.process.pids),
        "benchmark": (os.getpid(),),
    }
    taken: list[Window] = []
    while not taken or (taken[-1].is_noisy and len(taken) < patience.attempts):
        if patience.left_s <= 0 and taken:
            break
        await patience.wait_for_quiet()
        before = snapshot(groups)
        began = time.monotonic()
        found = await contender.process.ask(question, WINDOW_TIMEOUT_S)
        cpu = shares(before, snapshot(groups))
        if taken:
            patience.left_s -= time.monotonic() - began
        rounds = tuple((int(t), float(s)) for t, s in found["rounds"])
        taken.append(Window(contender.process.name, case.name, repeat, rounds, cpu, len(taken) + 1))
    best = min(taken, key=lambda window: window.cpu["foreign"])
    return msgspec.structs.replace(best, attempts=len(taken))


def chances(trial: Sequence[Window], engine_of: Mapping[str, str]) -> set[tuple[str, str]]:
    """The (variant, case) pairs that are worth repeating after the trial round."""
    best: dict[tuple[str, str], float] = {}
    for window in trial:
        key = (engine_of[window.variant], window.case)
        best[key] = max(best.get(key, 0.0), window.tokens_per_s)
    return {
        (w.variant, w.case)
        for w in trial
        if w.tokens_per_s >= CLOSE_TO_BEST * best[engine_of[w.variant], w.case]
    }


async def measure(
    contenders: Sequence[Contender],
    cases: Sequence[Case],
    *,
    repeats: int,
    seed: int,
    window_s: float,
    patience: Patience,
    tell: Callable[[str], None],
) -> tuple[list[Window], dict[str, str]]:
    """A trial round that also warms everything up (repeat -1), then ``repeats`` rounds.

    Within a round the engines take turns case by case, so that slow and quiet minutes of the
    machine meet all of them. Returns the windows, and why some have fewer: by name of the
    variant that failed.
    """
    failed: dict[str, str] = {}
    engine_of = {c.process.name: c.engine for c in contenders}
    wanted = {(c.process.name, case.name) for c in contenders for case in cases}
    windows: list[Window] = []
    for repeat in range(-1, repeats):
        began = time.monotonic()
        for case in cases:
            turns = [c for c in contenders if (c.process.name, case.name) in wanted]
            for contender in turns:
                name = contender.process.name
                if name in failed:
                    continue
                idle = [c for c in contenders if c is not contender]
                try:
                    window = await take_window(
                        contender,
                        idle,
                        case,
                        repeat=repeat,
                        seed=seed,
                        window_s=window_s,
                        patience=patience,
                    )
                except EngineFailed as exc:
                    if contender.required:
                        raise
                    failed[name] = str(exc)
                    tell(f"left out from here: {exc}")
                    continue
                windows.append(window)
                tell(_line(window, repeats))
        if repeat == -1:
            wanted = chances(windows, engine_of)
        elif repeat + 1 < repeats:
            left_s = (repeats - repeat - 1) * (time.monotonic() - began)
            tell(f"round {repeat + 1}/{repeats} done; about {left_s:.0f} s left")
    return windows, failed


def _line(window: Window, repeats: int) -> str:
    turn = "trial" if window.repeat < 0 else f"{window.repeat + 1}/{repeats}"
    noisy = f", others used {window.cpu['foreign']:.0%}" if window.is_noisy else ""
    return f"{turn}  {window.case}, {window.variant}: {window.tokens_per_s:,.0f} tokens/s{noisy}"
