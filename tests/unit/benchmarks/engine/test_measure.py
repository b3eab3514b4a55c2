"""Whose turn it is, what a noisy window costs, and who is asked again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks.engine import measure as module
from benchmarks.engine.cases import CASES, Case, batches
from benchmarks.engine.engine_process import EngineFailed
from benchmarks.engine.measure import Contender, Patience, Window, chances, measure, take_window

PREFILL = Case("prefill 4", "prefill", 4)
DECODE = Case("decode x2", "decode", 3, batch=2, steps=5)


class Fake:
    """Does ``tokens_per_s`` on each case."""

    def __init__(self, name: str, log: list[str], **tokens_per_s: float) -> None:
        self.name = name
        self.pids: tuple[int, ...] = ()
        self._log = log
        self._tokens_per_s = tokens_per_s

    async def ask(self, question: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        self._log.append(f"{self.name} {question['op']}")
        return {"rounds": [[self._tokens_per_s[question["op"]], 1.0]]}


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What others use, look by look; the last one stays."""
    shares_to_come = [0.0]

    def shares(*_: object) -> dict[str, float]:
        used = shares_to_come.pop(0) if len(shares_to_come) > 1 else shares_to_come[0]
        return {"foreign": used}

    monkeypatch.setattr(module, "shares", shares)
    monkeypatch.setattr(module, "snapshot", lambda groups: None)
    return shares_to_come


async def no_sleep(_: float) -> None: ...


def patience(left_s: float, attempts: int = 3) -> Patience:
    return Patience(left_s, attempts, no_sleep)


async def window_of(fake: Fake, patient: Patience) -> Window:
    return await take_window(
        Contender("e", fake), [], PREFILL, repeat=0, seed=1, window_s=1.0, patience=patient
    )


async def test_turns_go_round_case_by_case(foreign: list[float]) -> None:
    log: list[str] = []
    contenders = [Contender(n, Fake(n, log, prefill=10, decode=20)) for n in ("a", "b")]
    told: list[str] = []
    windows, failed = await measure(
        contenders,
        [PREFILL, DECODE],
        repeats=2,
        seed=1,
        window_s=1.0,
        patience=patience(0),
        tell=told.append,
    )
    one_round = ["a prefill", "b prefill", "a decode", "b decode"]
    assert failed == {}
    assert log == one_round * 3  # the trial round, then both repeats
    assert [w.repeat for w in windows] == [-1] * 4 + [0] * 4 + [1] * 4
    assert "trial  prefill 4, a: 10 tokens/s" in told
    assert foreign == [0.0]


async def test_what_has_no_chance_after_the_trial_round_is_not_asked_again(
    foreign: list[float],
) -> None:
    log: list[str] = []
    contenders = [
        Contender("e", Fake("e fast", log, prefill=100, decode=10)),
        Contender("e", Fake("e slow", log, prefill=10, decode=9)),
        Contender("other", Fake("other", log, prefill=1, decode=1)),
    ]
    await measure(
        contenders,
        [PREFILL, DECODE],
        repeats=1,
        seed=1,
        window_s=1.0,
        patience=patience(0),
        tell=lambda _: None,
    )
    # Only variants of one engine rule each other out, and case by case.
    repeated = ["e fast prefill", "other prefill", "e fast decode", "e slow decode", "other decode"]
    assert log[6:] == repeated


class Failing(Fake):
    async def ask(self, question: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        if question["op"] == "decode":
            raise EngineFailed(f"{self.name}: out of memory")
        return await super().ask(question, timeout_s)


async def test_one_that_fails_on_the_way_is_left_out_unless_it_is_required(
    foreign: list[float],
) -> None:
    log: list[str] = []
    good = Contender("e", Fake("good", log, prefill=10, decode=10))
    bad = Failing("bad", log, prefill=10)

    async def run(*contenders: Contender) -> tuple[list[Window], dict[str, str]]:
        return await measure(
            contenders,
            [PREFILL, DECODE],
            repeats=1,
            seed=1,
            window_s=1.0,
            patience=patience(0),
            tell=lambda _: None,
        )

    windows, failed = await run(Contender("e", bad), good)
    assert failed == {"bad": "bad: out of memory"}
    assert [w.variant for w in windows] == ["bad", "good", "good", "good", "good"]
    with pytest.raises(EngineFailed, match="out of memory"):
        await run(Contender("e", bad, required=True), good)


def test_the_best_variant_always_has_a_chance() -> None:
    def window(variant: str, tokens: int) -> Window:
        return Window(variant, "c", -1, ((tokens, 1.0),), {"foreign": 0.0}, 1)

    kept = chances([window("a", 100), window("b", 76), window("c", 74)], dict.fromkeys("abc", "e"))
    assert kept == {("a", "c"), ("b", "c")}


async def test_a_noisy_window_is_taken_again_and_the_quietest_counts(foreign: list[float]) -> None:
    #             quiet?  window  quiet?  window  quiet?  window
    foreign[:] = [0.0, 0.50, 0.0, 0.20, 0.0, 0.30, 0.0]
    log: list[str] = []
    window = await window_of(Fake("a", log, prefill=10), patience(100))
    assert len(log) == window.attempts == 3
    assert window.cpu["foreign"] == 0.20
    assert window.is_noisy


async def test_a_quiet_window_is_taken_once(foreign: list[float]) -> None:
    foreign[:] = [0.0, 0.04]
    log: list[str] = []
    window = await window_of(Fake("a", log, prefill=10), patience(100))
    assert len(log) == window.attempts == 1
    assert not window.is_noisy


async def test_patience_ends(foreign: list[float]) -> None:
    foreign[:] = [0.9]
    log: list[str] = []
    patient = patience(2.0)
    window = await window_of(Fake("a", log, prefill=10), patient)
    assert patient.left_s <= 0
    assert len(log) == 1  # waited in vain, measured once all the same
    assert window.is_noisy


def test_speed_is_of_all_rounds_together() -> None:
    window = Window("a", "c", 0, ((100, 1.0), (100, 3.0)), {"foreign": 0.0}, 1)
    assert window.tokens_per_s == 50.0


def test_prompts_are_the_same_for_all_engines_and_new_in_every_repeat() -> None:
    for case in CASES:
        first, second = batches(case, 2, 1, 0), batches(case, 2, 1, 1)
        assert first == batches(case, 2, 1, 0)
        assert [len(batch) for batch in first] == [case.batch] * 2
        prompts = [tuple(p) for made in (first, second) for batch in made for p in batch]
        assert len(set(prompts)) == len(prompts)
        assert {len(p) for p in prompts} == {case.prompt_tokens}
