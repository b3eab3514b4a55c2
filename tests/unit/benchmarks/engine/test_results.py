"""From windows to ratios and bars, and the pages that say so."""

from __future__ import annotations

import io
import json
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from benchmarks.engine import report
from benchmarks.engine.cases import BARS, CASES
from benchmarks.engine.gate import GateResult
from benchmarks.engine.measure import Window
from benchmarks.engine.report import EngineFacts, LeftOut, Result, Settings
from benchmarks.engine.results import (
    Memory,
    fastest,
    memory_verdicts,
    missed,
    ratios,
    speeds,
)
from benchmarks.engine.variants import PLANS, process_environment, variants_of
from benchmarks.provenance import Hardware, Provenance

CASE = "decode x1"
ENGINES = {
    "baton float32 plain": "baton",
    "baton bfloat16 plain": "baton",
    "vllm float32 plain": "vllm",
    "vllm float32 preload": "vllm",
}
ORIGIN = Provenance("c0ffee", "3.11.7", "Linux 6", {"torch": "2.13"}, Hardware("AMD EPYC", 2, 23.0))


def windows(
    variant: str, *tokens_per_s: int, foreign: float = 0.0, case: str = CASE
) -> list[Window]:
    """The first is of the trial round."""
    return [
        Window(variant, CASE, repeat, ((speed, 1.0),), {"foreign": foreign}, 1)
        for repeat, speed in enumerate(tokens_per_s, start=-1)
    ]


MEASURED = [
    *windows("baton float32 plain", 999, 100, 110, 105),
    *windows("baton bfloat16 plain", 999, 160, 150, 140, foreign=0.07),
    *windows("vllm float32 plain", 999, 99, 120, 90),
    *windows("vllm float32 preload", 999, 101, 100, 99),
]


def memory(engine: str, peak_mib: int, *, filled: bool = True) -> Memory:
    mib = 2**20
    return Memory(
        engine, f"{engine} float32 plain", 100 * mib, 900 * mib, 200 * mib, peak_mib * mib, filled
    )


def test_the_trial_round_is_not_counted() -> None:
    found = speeds(MEASURED, ENGINES)
    assert [s.variant for s in found] == list(ENGINES)
    assert found[0].median_tokens_per_s == 105
    assert found[0].best_tokens_per_s == 110
    assert [s.num_noisy for s in found] == [0, 3, 0, 0]


def test_each_side_counts_with_its_best_median() -> None:
    found = speeds(MEASURED, ENGINES)
    best = fastest(found, "vllm", CASE)
    assert best is not None
    assert best.variant == "vllm float32 preload"  # the other's best window is better
    (made,) = ratios(found, ["vllm"], [CASE])
    assert (made.our_variant, made.peer_variant) == ("baton bfloat16 plain", best.variant)
    assert made.of_medians == pytest.approx(150 / 100)
    assert made.of_bests == pytest.approx(160 / 101)
    assert made.bar == 1.5
    assert made.passed is True


def test_a_ratio_below_its_bar_is_missed_and_so_is_one_that_was_not_measured() -> None:
    slower = [*windows("baton float32 plain", 1, 149), *windows("vllm float32 plain", 1, 100)]
    made = ratios(speeds(slower, ENGINES), ["vllm"], [CASE])
    assert made[0].passed is False
    verdicts = memory_verdicts([memory("baton", 1_301)])
    assert missed(made, verdicts, ["vllm"], [CASE, "decode x8"]) == [
        "decode x1: 1.49 x vllm, 1.5 wanted",
        "decode x8: vllm was not measured",
        "memory of baton float32 plain: 1.30 x weights and pool, 1.3 allowed",
    ]
    assert missed(ratios(speeds(MEASURED, ENGINES), ["vllm"], [CASE]), [], ["vllm"], [CASE]) == []
    assert missed([], [], ["transformers"], [CASE]) == []


def test_only_our_filled_pool_is_held_to_the_bar() -> None:
    found = memory_verdicts(
        [memory("baton", 1_300), memory("vllm", 9_000), memory("baton", 1, filled=False)]
    )
    assert [(v.ratio, v.ratio_without_idle, v.passed) for v in found] == [(1.3, 1.1, True)]


def test_every_bar_is_about_a_case_and_a_peer_that_exist() -> None:
    assert {case for _, case in BARS} == {case.name for case in CASES}
    assert {peer for peer, _ in BARS} <= set(PLANS)


def test_start_modes_and_dtypes_are_all_tried_except_in_a_quick_run() -> None:
    named = [v.name for v in variants_of(PLANS["vllm"], quick=False)]
    assert named == [f"vllm {d} {m}" for d in ("float32", "bfloat16") for m in ("plain", "preload")]
    assert [v.name for v in variants_of(PLANS["vllm"], quick=True)] == ["vllm float32 plain"]


def test_peers_are_told_their_threads_and_ours_takes_nothing_from_the_environment() -> None:
    told = {
        name: process_environment(variants_of(plan, quick=True)[0], 1, "s")
        for name, plan in PLANS.items()
    }
    assert told["baton"] == {}
    assert told["transformers"]["OMP_NUM_THREADS"] == "1"
    assert len(told["vllm"]["VLLM_CPU_OMP_THREADS_BIND"].split(",")) == 1


@pytest.fixture
def result() -> Result:
    found = speeds(MEASURED, ENGINES)
    kept = [memory("baton", 1_200), memory("vllm", 700, filled=False)]
    return Result(
        version=1,
        measured_at="2026-03-04T00:00:00+00:00",
        provenance=ORIGIN,
        settings=Settings(2, 3, 1, 1.0, 65_536, 2_048, 64),
        checkpoint={"seed": 1},
        cases=tuple(case for case in CASES if case.name in (CASE, "decode x8")),
        engines=tuple(EngineFacts(e, v, {"torch": "2.13.0"}, 1.0) for v, e in ENGINES.items()),
        left_out=(LeftOut("transformers", "the index is down"),),
        gate=(GateResult("baton float32 plain", 4, 192, 2, 0.001, 0.0005),),
        speeds=tuple(found),
        ratios=tuple(ratios(found, ["vllm"], [CASE])),
        memory=tuple(kept),
        memory_verdicts=tuple(memory_verdicts(kept)),
        windows=tuple(MEASURED),
    )


def test_a_row_per_case_with_the_ratio_and_its_bar(result: Result) -> None:
    header, rows = report.speed_table(result)
    assert header == ["tokens/s", "baton", "vllm", "ours / vllm"]
    assert rows == [
        [CASE, "150 (160)*\nbf16 plain", "100 (101)\nf32 preload", "1.50 (1.58)\nbar 1.5: pass"],
        ["decode x8", "-", "-", "-"],
    ]


def test_memory_says_what_was_held_to_what(result: Result) -> None:
    _, rows = report.memory_table(result)
    assert rows[0][-1] == "1.20 (1.00 without idle)\nbar 1.3: pass"
    assert rows[1][-1] == "pool not filled"


def test_the_page_names_noise_gate_and_who_is_missing(result: Result) -> None:
    page = report.markdown(result)
    assert "left out: transformers: the index is down" in page
    assert "in 3 of 12 windows others used more than 5% of the machine (at most 7%)" in page
    assert "plain (all but 2 of 192, at most 0.0005 below the best logit, 0.001 allowed)" in page
    assert "| 150 (160)*, bf16 plain |" in page
    terminal = io.StringIO()
    report.show(result, Console(file=terminal, width=80))
    assert "bar 1.5: pass" in terminal.getvalue()
    assert "…" not in terminal.getvalue()


def test_every_window_is_in_the_json(result: Result, tmp_path: Path) -> None:
    as_json, as_markdown = report.write(result, tmp_path / "new")
    assert as_json.name == "engine_2x-amd-epyc_202603.json"
    assert as_markdown.read_text() == report.markdown(result)
    assert len(json.loads(as_json.read_bytes())["windows"]) == 16
    assert msgspec.json.decode(as_json.read_bytes(), type=Result) == result
