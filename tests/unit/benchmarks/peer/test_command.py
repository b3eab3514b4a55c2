"""The command: what it is asked becomes options, what it finds becomes an exit status."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from benchmarks.peer import __main__ as command
from benchmarks.peer.cases import FIGURES
from benchmarks.peer.gate import GateRed
from benchmarks.peer.report import FORMAT_VERSION, Result, Settings
from benchmarks.peer.results import Ratio
from benchmarks.peer.run import Options
from benchmarks.provenance import Hardware, Provenance

MET = tuple(
    Ratio("eager", "1P+1D", "512/32 x8", figure, 1.6, 1.5, True, None) for figure in FIGURES
)
RESULT = Result(
    version=FORMAT_VERSION,
    measured_at="2026-03-04T00:00:00+00:00",
    provenance=Provenance("c0ffee", "3.11.7", "Linux 6", {}, Hardware("AMD EPYC", 2, 23.0)),
    settings=Settings(2, 1, False, {}, {}, True),
    checkpoint={},
    systems=(),
    left_out=(),
    gate=(),
    summaries=(),
    ratios=(),
    transfers=(),
    transfer_verdicts=(),
    windows=(),
)


def called(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, outcome: Result | Exception, *said: str
) -> tuple[int, str, list[Options]]:
    asked: list[Options] = []

    async def run(options: Options, tell: object) -> Result:
        asked.append(options)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr(command.report, "show", lambda result, console: None)
    found = CliRunner().invoke(command.main, ["--out", str(tmp_path), *said])
    return found.exit_code, found.output, asked


def test_all_of_both_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, said, (options,) = called(monkeypatch, tmp_path, RESULT)
    assert code == 0
    assert options.starts == ("eager", "compiled")
    assert options.shapes == ("1P+1D", "2 colocated")
    assert "bar missed: vLLM was not measured" in said
    assert len(list(tmp_path.iterdir())) == 2


def test_quick_waits_for_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = ("--quick", "--start", "eager", "--no-control", "--repeats", "5")
    _, _, (options,) = called(monkeypatch, tmp_path, RESULT, *said)
    assert (options.repeats, options.patience_s) == (1, 0.0)
    assert (options.starts, options.shapes) == (("eager",), ("1P+1D",))


def test_a_missed_bar_is_the_exit_status_where_it_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    met = msgspec.structs.replace(RESULT, ratios=MET)
    slow = msgspec.structs.replace(MET[-1], value=1.4, passed=False)
    missed = msgspec.structs.replace(RESULT, ratios=(*MET[:-1], slow))
    assert called(monkeypatch, tmp_path, met, "--enforce")[0] == 0
    code, said, _ = called(monkeypatch, tmp_path, missed, "--enforce")
    assert code == 1
    assert "bar missed: 512/32 x8, rps: 1.40 x vLLM eager 1P+1D, 1.5 wanted" in said
    assert called(monkeypatch, tmp_path, missed)[0] == 0


def test_a_red_gate_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, said, _ = called(monkeypatch, tmp_path, GateRed("token 3 differs"))
    assert code == 1
    assert "token 3 differs" in said
    assert not list(tmp_path.iterdir())
