"""The scheduling benchmark times what it says it times. No times are asserted."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from benchmarks import scheduling
from benchmarks.scheduling import Load, Result, Settings, measure_cell

SETTINGS = Settings(num_steps=30)


def test_a_cell_keeps_its_load() -> None:
    cell = measure_cell(16, 50, SETTINGS)
    assert cell.mean_running == pytest.approx(16, abs=1)
    assert cell.num_finished > 0
    assert 0 < cell.median_ms <= cell.p99_ms <= cell.max_ms


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
    done = CliRunner().invoke(scheduling.main, ["--steps", "10", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    [path] = tmp_path.glob("scheduling_*.json")
    result = msgspec.json.decode(path.read_bytes(), type=Result)
    assert [(c.num_running, c.num_waiting) for c in result.cells] == [(4, 0), (4, 10)]
    assert "4 running, 10 waiting" in done.output
