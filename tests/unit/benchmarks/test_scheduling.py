"""The scheduling benchmark times what it says it times. No times are asserted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from baton.engine.sequence import SchedulerCounts
from benchmarks import scheduling
from benchmarks.scheduling import Load, Result, Settings, measure_cell

SETTINGS = Settings(num_steps=30)


def test_a_cell_keeps_its_load() -> None:
    cell = measure_cell(16, 50, SETTINGS)
    assert cell.mean_running == pytest.approx(16, abs=1)
    assert cell.num_finished > 0
    assert 0 < cell.median_ms <= cell.p99_ms <= cell.max_ms


def test_repeats_are_alike_and_the_fastest_of_each_step_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Slow at another step in each repeat: in none of all."""
    runs: list[int] = []

    def warmed_up(*cell: Any) -> tuple[Load, SchedulerCounts]:
        load, counts = scheduling_warmed_up(*cell)
        runs.append(0)
        plain = load.step

        def step() -> float:
            plain()
            runs[-1] += 1
            return 9.0 if runs[-1] == len(runs) else 0.001

        monkeypatch.setattr(load, "step", step)
        return load, counts

    scheduling_warmed_up = scheduling.warmed_up
    monkeypatch.setattr(scheduling, "warmed_up", warmed_up)
    once = measure_cell(4, 10, Settings(num_steps=10))
    assert once.max_ms == pytest.approx(9_000)
    cell = measure_cell(4, 10, Settings(num_steps=10, num_repeats=3))
    assert cell.max_ms == pytest.approx(1)
    assert runs == [10] * 4
    assert (cell.num_chunks, cell.num_finished) == (once.num_chunks, once.num_finished)


def test_prompts_begin_alike_and_sequences_come_and_go() -> None:
    load = Load(8, 20, SETTINGS)
    for _ in range(200):
        load.step()
    counts = load.scheduler.counts
    assert counts.num_cache_hit_tokens > 0
    assert counts.num_preemptions == 0
    assert load.num_finished > 8
    assert load.scheduler.num_running + load.scheduler.num_waiting == 28
    assert load.scheduler.check_integrity() == []


def test_the_command_writes_its_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scheduling, "RUNNING", (4,))
    monkeypatch.setattr(scheduling, "WAITING", (0, 10))
    done = CliRunner().invoke(
        scheduling.main, ["--steps", "10", "--repeats", "2", "--out", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    [path] = tmp_path.glob("scheduling_*.json")
    result = msgspec.json.decode(path.read_bytes(), type=Result)
    assert [(c.num_running, c.num_waiting) for c in result.cells] == [(4, 0), (4, 10)]
    assert "4 running, 10 waiting" in done.output
