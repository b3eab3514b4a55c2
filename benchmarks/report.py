"""The result as JSON, as a markdown page and as a table on the terminal."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.gate import GateResult
from benchmarks.metrics import Quantiles, Ratio, Segment, Summary, ratio, summarise
from benchmarks.provenance import Provenance, slug
from benchmarks.workload import Workload

FORMAT_VERSION = 1
MUCH_FOREIGN_CPU = 0.05


class DeploymentFacts(msgspec.Struct, frozen=True):
    """``config`` is null for a deployment that was running already."""

    name: str
    config: dict[str, Any] | None


class Result(msgspec.Struct, frozen=True):
    """``ratios`` divide by the last deployment. ``segments`` hold every single request."""

    version: int
    measured_at: str
    provenance: Provenance
    workload: Workload
    deployments: tuple[DeploymentFacts, ...]
    gate: tuple[GateResult, ...]
    summaries: tuple[Summary, ...]
    ratios: tuple[Ratio, ...]
    segments: tuple[Segment, ...]


def make_result(
    workload: Workload,
    origin: Provenance,
    deployments: Sequence[DeploymentFacts],
    gate: Sequence[GateResult],
    segments: Sequence[Segment],
    now: datetime.datetime,
) -> Result:
    summaries = [
        summarise(
            [s for s in segments if (s.deployment, s.rate_rps) == (d.name, rate)], workload.limits
        )
        for rate in workload.schedule.rates_rps
        for d in deployments
    ]
    baseline = {s.rate_rps: s for s in summaries if s.deployment == deployments[-1].name}
    return Result(
        version=FORMAT_VERSION,
        measured_at=now.isoformat(timespec="seconds"),
        provenance=origin,
        workload=workload,
        deployments=tuple(deployments),
        gate=tuple(gate),
        summaries=tuple(summaries),
        ratios=tuple(
            ratio(summary, baseline[summary.rate_rps])
            for summary in summaries
            if summary.deployment != deployments[-1].name
        ),
        segments=tuple(_rounded(segment) for segment in segments),
    )


def write(result: Result, folder: Path) -> tuple[Path, Path]:
    """``<theme>_<hardware>_<yyyymm>`` .json and .md; an older result of that name is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    month = result.measured_at[:7].replace("-", "")
    name = f"{result.workload.name}_{slug(result.provenance.hardware)}_{month}"
    as_json, as_markdown = folder / f"{name}.json", folder / f"{name}.md"
    as_json.write_bytes(msgspec.json.encode(result) + b"\n")
    as_markdown.write_text(markdown(result), encoding="utf-8")
    return as_json, as_markdown


def rate_table(result: Result, rate_rps: float) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one rate: a row per metric, a column per deployment, the ratios last."""
    summaries = [s for s in result.summaries if s.rate_rps == rate_rps]
    ratios = [r for r in result.ratios if r.rate_rps == rate_rps]
    header = [f"at {rate_rps:g} requests/s", *(s.deployment for s in summaries)]
    header += [f"{r.deployment} / {r.baseline}" for r in ratios]
    of_each: list[tuple[str, Callable[[Summary], str], Callable[[Ratio], str]]] = [
        ("TTFT ms", lambda s: _three(s.ttft_ms), lambda r: _factors(r.ttft_p50, r.ttft_p99)),
        ("TPOT ms", lambda s: _three(s.tpot_ms), lambda r: _factors(r.tpot_p50, r.tpot_p99)),
        ("TBT ms", lambda s: _three(s.tbt_ms), lambda r: _factors(r.tbt_p50, r.tbt_p99)),
        (
            "second-token gap ms",
            lambda s: _three(s.second_token_gap_ms),
            lambda r: _factors(r.second_token_gap_p50, r.second_token_gap_p99),
        ),
        ("goodput requests/s", _goodput, lambda r: _factors(r.goodput)),
        ("within the SLO", lambda s: _percent(s.attainment), _nothing),
        (
            "output tokens/s",
            lambda s: f"{s.output_tokens_per_s:.0f}",
            lambda r: _factors(r.output_tokens_per_s),
        ),
        ("requests (errors)", lambda s: f"{s.num_requests} ({_errors(s)})", _nothing),
        ("CPU own / foreign", _cpu, _nothing),
    ]
    rows = [
        [name, *map(of_summary, summaries), *map(of_ratio, ratios)]
        for name, of_summary, of_ratio in of_each
    ]
    return header, rows


def show(result: Result, console: Console) -> None:
    for rate_rps in result.workload.schedule.rates_rps:
        header, rows = rate_table(result, rate_rps)
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for number, column in enumerate(header):
            table.add_column(column, justify="right" if number else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(f"[dim]{_legend(result)}[/dim]")
    for line in _noise_lines(result):
        console.print(f"[bold]{line}[/bold]")


def markdown(result: Result) -> str:
    origin, workload = result.provenance, result.workload
    lines = [
        f"# {workload.name}, {origin.hardware.num_cpus} x {origin.hardware.cpu}",
        "",
        f"{result.measured_at}, commit `{origin.commit or 'unknown'}`, seed {workload.seed}, "
        f"Python {origin.python}, torch {origin.packages['torch']}.",
        "",
        *(f"- {line}" for line in _gate_lines(result)),
        f"- {_conditions(workload)}",
        f"- {_legend(result)}",
        *(f"- {line}" for line in _noise_lines(result)),
    ]
    for rate_rps in workload.schedule.rates_rps:
        lines += ["", *_markdown_table(*rate_table(result, rate_rps))]
    hops = list(dict.fromkeys(name for s in result.summaries for name in s.hop_ms))
    rows = [
        [
            f"{s.rate_rps:g}",
            s.deployment,
            *(_three(s.hop_ms[hop]) if hop in s.hop_ms else "-" for hop in hops),
        ]
        for s in result.summaries
    ]
    lines += ["", "Where the router saw the time go, ms:", ""]
    lines += _markdown_table(["requests/s", "deployment", *hops], rows)
    return "\n".join(lines) + "\n"


def _legend(result: Result) -> str:
    slo = result.workload.slo
    return (
        f"p50 / p90 / p99 (ratios: p50, p99); goodput: requests/s with TTFT up to {slo.ttft_ms:g} "
        f"ms and TPOT up to {slo.tpot_ms:g} ms (least and most of the repeats)"
    )


def _conditions(workload: Workload) -> str:
    schedule = workload.schedule
    return (
        f"open loop, Poisson arrivals; repeats: {schedule.repeats}, each {schedule.window_s:g} s "
        f"after {schedule.warmup_s:g} s of warm-up, deployments in turn; the client runs on the "
        "same processors"
    )


def _noise_lines(result: Result) -> list[str]:
    most = max((s.cpu["foreign"] for s in result.segments if "foreign" in s.cpu), default=math.nan)
    if math.isnan(most) or most < MUCH_FOREIGN_CPU:
        return []
    return [
        f"noisy: in one window other processes used {most:.0%} of the machine; "
        "repeat the run when it is idle"
    ]


def _gate_lines(result: Result) -> list[str]:
    return [
        f"gate green: {g.compared[0]} and {g.compared[1]} gave the same greedy tokens to "
        f"{g.num_prompts} prompts ({g.num_tokens} tokens; {g.num_near_ties} parted at a near tie)"
        for g in result.gate
    ]


def _goodput(s: Summary) -> str:
    repeats = s.goodput_rps_of_repeats
    spread = f" ({min(repeats):.2f}-{max(repeats):.2f})" if len(repeats) > 1 else ""
    return f"{s.goodput_rps:.2f}{spread}"


def _errors(s: Summary) -> str:
    return ", ".join(f"{num} {code}" for code, num in sorted(s.errors.items())) or "0"


def _cpu(s: Summary) -> str:
    return " / ".join(_percent(s.cpu.get(name, math.nan)) for name in ("deployment", "foreign"))


def _nothing(_: Ratio) -> str:
    return ""


def _factors(*values: float) -> str:
    return ", ".join("-" if math.isnan(value) else f"{value:.2f}" for value in values)


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(columns)} |",
        f"|{'|'.join(['---'] * len(columns))}|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _three(q: Quantiles) -> str:
    return "-" if q.num == 0 else " / ".join(_short(v) for v in (q.p50, q.p90, q.p99))


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.0%}"


def _rounded(segment: Segment) -> Segment:
    """To 10 microseconds: finer than any clock on the way, and a fraction of the bytes."""
    records = tuple(
        msgspec.structs.replace(
            r,
            arrival_s=round(r.arrival_s, 5),
            sent_s=round(r.sent_s, 5),
            token_times_s=tuple(round(at, 5) for at in r.token_times_s),
            hop_ms={name: round(ms, 3) for name, ms in r.hop_ms.items()},
        )
        for r in segment.records
    )
    return msgspec.structs.replace(segment, records=records)
