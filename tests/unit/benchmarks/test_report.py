from __future__ import annotations

import datetime
import io
import json
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from benchmarks import report
from benchmarks.arrivals import Fixed
from benchmarks.gate import GateResult
from benchmarks.load_job import RequestRecord
from benchmarks.metrics import Segment
from benchmarks.provenance import Hardware, Provenance, provenance, slug
from benchmarks.workload import Schedule, SloLimits, Workload

ORIGIN = Provenance("c0ffee", "3.11.7", "Linux 6", {"torch": "2.13"}, Hardware("AMD EPYC", 2, 23.0))
WORKLOAD = Workload(
    name="small-load",
    seed=1,
    prompt_tokens=Fixed(tokens=4),
    output_tokens=Fixed(tokens=2),
    schedule=Schedule(rates_rps=(2.0, 4.0), repeats=1, window_s=2.0),
    slo=SloLimits(ttft_ms=150, tpot_ms=20),
)


def segment(name: str, rate_rps: float, ttft_s: float, error: str = "") -> Segment:
    times = () if error else (2.0 + ttft_s, 2.01 + ttft_s)
    of_it = RequestRecord(2.0, 2.0, True, times, error, {"prefill": 1.23456})
    return Segment(name, rate_rps, 0, 2.0, 2.0, (of_it,), {"deployment": 0.5, "foreign": 0.25})


@pytest.fixture
def result() -> report.Result:
    return report.make_result(
        WORKLOAD,
        ORIGIN,
        [report.DeploymentFacts("1P+1D", {"version": 1}), report.DeploymentFacts("2M", None)],
        [GateResult(("1P+1D", "2M"), 8, 256, 1)],
        [
            segment("1P+1D", 2.0, 0.05),
            segment("2M", 2.0, 0.1),
            segment("1P+1D", 4.0, 0.05),
            segment("2M", 4.0, 0.1, error="overloaded"),
        ],
        datetime.datetime(2026, 3, 4, tzinfo=datetime.UTC),
    )


def test_a_row_per_metric_and_the_ratio_beside(result: report.Result) -> None:
    header, rows = report.rate_table(result, 2.0)
    assert header == ["at 2 requests/s", "1P+1D", "2M", "1P+1D / 2M"]
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["TTFT ms"] == ["50.0 / 50.0 / 50.0", "100 / 100 / 100", "0.50, 0.50"]
    assert by_name["goodput requests/s"] == ["0.50", "0.50", "1.00"]
    assert by_name["CPU own / foreign"] == ["50% / 25%", "50% / 25%", ""]


def test_errors_are_named_and_have_no_latency(result: report.Result) -> None:
    _, rows = report.rate_table(result, 4.0)
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["requests (errors)"][1] == "1 (1 overloaded)"
    assert by_name["TTFT ms"][1:] == ["-", "-, -"]
    assert by_name["goodput requests/s"][1:] == ["0.00", "-"]


def test_files_are_named_by_theme_hardware_and_month(result: report.Result, tmp_path: Path) -> None:
    as_json, as_markdown = report.write(result, tmp_path / "new")
    assert as_json.name == "small-load_2x-amd-epyc_202603.json"
    assert as_markdown.name == "small-load_2x-amd-epyc_202603.md"
    read = json.loads(as_json.read_bytes())
    assert read["provenance"]["commit"] == "c0ffee"
    assert read["workload"]["seed"] == 1
    assert read["deployments"][0]["config"] == {"version": 1}
    assert read["summaries"][3]["ttft_ms"]["p50"] is None
    assert read["segments"][0]["records"][0]["hop_ms"] == {"prefill": 1.235}
    page = as_markdown.read_text()
    assert "commit `c0ffee`, seed 1" in page
    assert "(256 tokens; 1 parted at a near tie)" in page
    assert "| TTFT ms | 50.0 / 50.0 / 50.0 | 100 / 100 / 100 | 0.50, 0.50 |" in page


def test_the_tables_fit_a_terminal(result: report.Result) -> None:
    text = io.StringIO()
    report.show(result, Console(file=text, width=80))
    assert "50.0 / 50.0 / 50.0" in text.getvalue()
    assert "…" not in text.getvalue()


def test_a_busy_machine_is_said(result: report.Result) -> None:
    said = "in one window other processes used 25% of the machine"
    assert said in report.markdown(result)
    quiet = [msgspec.structs.replace(s, cpu={"foreign": 0.01}) for s in result.segments]
    quiet_result = msgspec.structs.replace(result, segments=tuple(quiet))
    assert "noisy" not in report.markdown(quiet_result)


def test_provenance_holds_versions_and_no_path() -> None:
    found = provenance()
    assert set(found.packages) >= {"torch", "grpcio"}
    assert "/" not in found.commit + found.hardware.cpu.replace("w/", "")


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ("Intel(R) Xeon(R) Processor @ 2.10GHz", "4x-intel-xeon"),
        ("AMD EPYC 7B13", "4x-amd-epyc-7b13"),
    ],
)
def test_slug(cpu: str, expected: str) -> None:
    assert slug(Hardware(cpu, 4, 8.0)) == expected
