"""The command: what it is asked becomes options, what it finds becomes an exit status."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from benchmarks.engine import __main__ as command
from benchmarks.engine.gate import GateRed
from benchmarks.engine.report import Result, Settings
from benchmarks.engine.results import MemoryVerdict
from benchmarks.engine.stage import Options
from benchmarks.provenance import Hardware, Provenance

ORIGIN = Provenance("c0ffee", "3.11.7", "Linux 6", {"torch": "2.13"}, Hardware("AMD EPYC", 2, 23.0))
EMPTY = Result(
    version=1,
    measured_at="2026-03-04T00:00:00+00:00",
    provenance=ORIGIN,
    settings=Settings(2, 5, 1, 1.0, 65_536, 2_048, 64),
    checkpoint={},
    cases=(),
    engines=(),
    left_out=(),
    gate=(),
    speeds=(),
    ratios=(),
    memory=(),
    memory_verdicts=(),
    windows=(),
)
MISSED = msgspec.structs.replace(
    EMPTY, memory_verdicts=(MemoryVerdict("baton float32 plain", 2.0, 1.5, 1.3, False),)
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """Options of the runs; each finds a missed bar."""
    found: list[Options] = []

    async def run(options: Options, tell: Callable[[str], None]) -> Result:
        found.append(options)
        return MISSED

    monkeypatch.setattr(command, "run", run)
    return found


def test_a_missed_bar_is_printed_and_only_enforced_when_told(
    asked: list[Options], tmp_path: Path
) -> None:
    arguments = ["--out", str(tmp_path)]
    told = CliRunner().invoke(command.main, arguments)
    assert told.exit_code == 0
    assert "bar missed: memory of baton float32 plain: 2.00 x" in told.output
    assert len(list(tmp_path.iterdir())) == 2
    assert CliRunner().invoke(command.main, [*arguments, "--enforce"]).exit_code == 1
    assert asked[0] == asked[1]
    assert asked[0].peers == ("vllm", "transformers")
    assert asked[0].repeats == 5
    assert asked[0].scratch.is_absolute()


def test_quick_is_one_short_repeat_without_installations(
    asked: list[Options], tmp_path: Path
) -> None:
    arguments = ["--quick", "--peers", "none", "--peer-dir", "x", "--out", str(tmp_path)]
    assert CliRunner().invoke(command.main, arguments).exit_code == 0
    (options,) = asked
    assert options.quick
    assert options.peers == ()
    assert (options.repeats, options.dtypes, options.patience_s) == (1, ("float32",), 0.0)
    assert options.peer_folder.is_absolute()


def test_what_is_unknown_is_refused_with_what_there_is() -> None:
    told = CliRunner().invoke(command.main, ["--peers", "vllm,sglang"])
    assert told.exit_code == 2
    assert "'sglang' is none of vllm, transformers" in told.output


def test_a_red_gate_is_an_error_with_the_place_of_the_logs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def run(options: Options, tell: Callable[[str], None]) -> Result:
        raise GateRed("baton float32 plain: token 3 is 7")

    monkeypatch.setattr(command, "run", run)
    told = CliRunner().invoke(command.main, ["--out", str(tmp_path)])
    assert told.exit_code == 1
    assert "token 3 is 7 (logs: .runtime/bench-engine/logs)" in told.output
    assert list(tmp_path.iterdir()) == []
