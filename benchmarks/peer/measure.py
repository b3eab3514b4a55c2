"""The run: every system in turn, case by case, over and over, and who else used the processors."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import msgspec

from benchmarks.cpu import shares, snapshot
from benchmarks.engine.measure import MUCH_FOREIGN_CPU, Patience
from benchmarks.peer.ask import ask, body, wake
from benchmarks.peer.cases import CASES, Case, num_requests, prompts
from benchmarks.peer.client_process import Client
from benchmarks.peer.job import Answered
from benchmarks.peer.systems import System, Tell

WARM_REQUESTS = 2
"""Before each window, as a system has just been woken; not measured."""


class Request(msgspec.Struct, frozen=True):
    """Milliseconds from when it was sent; tpot: from the first to the last token, per token."""

    ttft_ms: float
    tpot_ms: float
    e2e_ms: float


class Window(msgspec.Struct, frozen=True):
    """One system on one case, once. seconds: first request sent to last token. cpu: shares of the
    machine. attempts: how often it took to be left alone."""

    system: str
    case: str
    repeat: int
    requests: tuple[Request, ...]
    seconds: float
    cpu: dict[str, float]
    attempts: int = 1

    @property
    def rps(self) -> float:
        return len(self.requests) / self.seconds

    @property
    def is_noisy(self) -> bool:
        return self.cpu["foreign"] > MUCH_FOREIGN_CPU


def wants(system: System, case: Case) -> bool:
    return system.shape == "1P+1D" or case.has_control


async def measure(
    systems: Sequence[System],
    client: Client,
    *,
    repeats: int,
    seed: int,
    quick: bool,
    patience: Patience,
    tell: Tell,
) -> list[Window]:
    """Systems take turns at each case, so that slow and quiet minutes of the machine meet all of
    them. All are stopped but the one whose turn it is. Raises EngineFailed."""
    windows = []
    for repeat in range(repeats):
        began = time.monotonic()
        for case in CASES:
            for system in systems:
                if not wants(system, case):
                    continue
                bodies = _bodies(case, seed, repeat, quick=quick)
                taken = [await _take(system, systems, client, case, repeat, bodies, patience)]
                while taken[-1].is_noisy and len(taken) < patience.attempts and patience.left_s > 0:
                    patience.left_s -= taken[-1].seconds
                    taken.append(
                        await _take(system, systems, client, case, repeat, bodies, patience)
                    )
                best = min(taken, key=lambda window: window.cpu["foreign"])
                windows.append(msgspec.structs.replace(best, attempts=len(taken)))
                tell(_line(windows[-1], repeats))
        if repeat + 1 < repeats:
            left_s = (repeats - repeat - 1) * (time.monotonic() - began)
            tell(f"round {repeat + 1}/{repeats} done; about {left_s:.0f} s left")
    return windows


def _bodies(case: Case, seed: int, repeat: int, *, quick: bool) -> list[bytes]:
    count = WARM_REQUESTS + num_requests(case, quick=quick)
    return [body(prompt) for prompt in prompts(case, count, seed, repeat)]


async def _take(
    system: System,
    systems: Sequence[System],
    client: Client,
    case: Case,
    repeat: int,
    bodies: Sequence[bytes],
    patience: Patience,
) -> Window:
    await patience.wait_for_quiet()
    try:
        await wake(system, client, bodies[:WARM_REQUESTS])
        groups = {
            "system": system.pids,
            "stopped": tuple(pid for other in systems if other is not system for pid in other.pids),
            "client": (client.pid, os.getpid()),
        }
        before = snapshot(groups)
        answers = await ask(system, client, bodies[WARM_REQUESTS:], case.concurrency)
        cpu = shares(before, snapshot(groups))
    finally:
        system.pause()
    seconds = max(answer.token_times_s[-1] for answer in answers)
    requests = tuple(map(_times, answers))
    return Window(system.name, case.name, repeat, requests, seconds, cpu)


def _times(answer: Answered) -> Request:
    first, last = answer.token_times_s[0], answer.token_times_s[-1]
    return Request(
        ttft_ms=1e3 * (first - answer.sent_s),
        tpot_ms=1e3 * (last - first) / (len(answer.token_times_s) - 1),
        e2e_ms=1e3 * (last - answer.sent_s),
    )


def _line(window: Window, repeats: int) -> str:
    noisy = f", others used {window.cpu['foreign']:.0%}" if window.is_noisy else ""
    return (
        f"{window.repeat + 1}/{repeats}  {window.case}, {window.system}: {window.rps:.2f} "
        f"requests/s{noisy}"
    )
