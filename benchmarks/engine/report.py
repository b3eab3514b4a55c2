"""The result as JSON, as a markdown page and as one table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.engine.cases import Case
from benchmarks.engine.gate import GateResult
from benchmarks.engine.measure import MUCH_FOREIGN_CPU, Window
from benchmarks.engine.results import Memory, MemoryVerdict, Ratio, Speed, fastest
from benchmarks.engine.variants import SHORT_DTYPES
from benchmarks.provenance import Provenance, slug

FORMAT_VERSION = 1
MIB = 2**20
NEW_LINE = "\n"


class Settings(msgspec.Struct, frozen=True):
    num_threads: int
    repeats: int
    seed: int
    window_s: float
    pool_tokens: int
    max_num_batched_tokens: int
    max_num_seqs: int


class EngineFacts(msgspec.Struct, frozen=True):
    """One process that was measured."""

    engine: str
    variant: str
    versions: dict[str, str]
    load_s: float


class LeftOut(msgspec.Struct, frozen=True):
    name: str
    reason: str


class Result(msgspec.Struct, frozen=True):
    """windows: every single one, those of the trial round too (repeat -1)."""

    version: int
    measured_at: str
    provenance: Provenance
    settings: Settings
    checkpoint: dict[str, object]
    cases: tuple[Case, ...]
    engines: tuple[EngineFacts, ...]
    left_out: tuple[LeftOut, ...]
    gate: tuple[GateResult, ...]
    speeds: tuple[Speed, ...]
    ratios: tuple[Ratio, ...]
    memory: tuple[Memory, ...]
    memory_verdicts: tuple[MemoryVerdict, ...]
    windows: tuple[Window, ...]


def write(result: Result, folder: Path) -> tuple[Path, Path]:
    """``engine_<hardware>_<yyyymm>`` .json and .md; an older result of that name is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    month = result.measured_at[:7].replace("-", "")
    name = f"engine_{slug(result.provenance.hardware)}_{month}"
    as_json, as_markdown = folder / f"{name}.json", folder / f"{name}.md"
    as_json.write_bytes(msgspec.json.encode(result) + b"\n")
    as_markdown.write_text(markdown(result), encoding="utf-8")
    return as_json, as_markdown


def speed_table(result: Result) -> tuple[list[str], list[list[str]]]:
    """A row per case; each engine in its fastest variant; ratios of ours to each peer. Cells have
    two lines: the figure, and the variant or the bar."""
    engines = list(dict.fromkeys(e.engine for e in result.engines))
    peers = list(dict.fromkeys(r.peer for r in result.ratios))
    header = ["tokens/s", *engines, *(f"ours / {peer}" for peer in peers)]
    rows = []
    for case in result.cases:
        row = [case.name]
        row += [_speed(fastest(result.speeds, engine, case.name)) for engine in engines]
        for peer in peers:
            found = [r for r in result.ratios if (r.peer, r.case) == (peer, case.name)]
            row.append(_verdict(found[0]) if found else "-")
        rows.append(row)
    return header, rows


def variant_table(result: Result) -> tuple[list[str], list[list[str]]]:
    """A row per variant, a column per case: those that the trial round ruled out stay empty."""
    header = ["tokens/s, median (best)", *(case.name for case in result.cases)]
    of_pair = {(s.variant, s.case): s for s in result.speeds}
    rows = [
        [engine.variant, *(_plain(of_pair.get((engine.variant, c.name))) for c in result.cases)]
        for engine in result.engines
    ]
    return header, rows


def memory_table(result: Result) -> tuple[list[str], list[list[str]]]:
    header = ["resident, MiB", "weights", "pool", "peak", "idle", "peak / (weights + pool)"]
    verdicts = {v.variant: v for v in result.memory_verdicts}
    rows = []
    for m in result.memory:
        said = f"{m.ratio:.2f} ({m.ratio_without_idle:.2f} without idle)"
        if m.variant in verdicts:
            said += f"\nbar {verdicts[m.variant].bar:g}: {_passed(verdicts[m.variant].passed)}"
        elif not m.pool_filled:
            said = "pool not filled"
        sizes = (m.weights_bytes, m.pool_bytes, m.peak_bytes, m.idle_bytes)
        rows.append([m.variant, *(f"{size / MIB:,.0f}" for size in sizes), said])
    return header, rows


def show(result: Result, console: Console) -> None:
    for header, rows in (speed_table(result), memory_table(result)):
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for number, column in enumerate(header):
            table.add_column(column, justify="right" if number else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in _notes(result):
        console.print(line)


def markdown(result: Result) -> str:
    origin = result.provenance
    lines = [
        f"# Engines, {origin.hardware.num_cpus} x {origin.hardware.cpu}",
        "",
        f"{result.measured_at}, commit `{origin.commit or 'unknown'}`, Python {origin.python}.",
        "",
        *(f"- {line}" for line in _notes(result)),
        "",
        *_markdown_table(*speed_table(result)),
        "",
        *_markdown_table(*variant_table(result)),
        "",
        *_markdown_table(*memory_table(result)),
    ]
    return "\n".join(lines) + "\n"


def _notes(result: Result) -> list[str]:
    settings = result.settings
    found = [
        f"{settings.num_threads} threads each, {settings.repeats} interleaved repeats, windows of "
        f"{settings.window_s:g} s, seed {settings.seed}; median (best) of the repeats; an "
        "engine's column shows its fastest dtype and start mode for the case",
        "versions: "
        + ", ".join(
            f"{engine} {' '.join(f'{k} {v}' for k, v in versions.items())}"
            for engine, versions in {e.engine: e.versions for e in result.engines}.items()
        ),
    ]
    found.append(
        "gate green: the greedy tokens of transformers in float32 were written by "
        + "; ".join(map(_passage, result.gate))
    )
    found += [f"left out: {left.name}: {left.reason}" for left in result.left_out]
    noisy = sum(w.is_noisy for w in result.windows if w.repeat >= 0)
    if noisy:
        most = max(w.cpu["foreign"] for w in result.windows if w.repeat >= 0)
        total = sum(w.repeat >= 0 for w in result.windows)
        found.append(
            f"noisy: in {noisy} of {total} windows others used more than {MUCH_FOREIGN_CPU:.0%} of "
            f"the machine (at most {most:.0%}), marked *; repeat the run when it is idle"
        )
    return found


def _passage(gate: GateResult) -> str:
    if not gate.num_near_ties:
        return f"{gate.engine} (all {gate.num_tokens})"
    return (
        f"{gate.engine} (all but {gate.num_near_ties} of {gate.num_tokens}, at most "
        f"{gate.most_off:.2g} below the best logit, {gate.tolerance:g} allowed)"
    )


def _speed(speed: Speed | None) -> str:
    if speed is None:
        return "-"
    dtype, mode = speed.variant.split()[1:]
    return f"{_plain(speed)}\n{SHORT_DTYPES[dtype]} {mode}"


def _plain(speed: Speed | None) -> str:
    if speed is None:
        return "-"
    mark = "*" if speed.num_noisy else ""
    return f"{speed.median_tokens_per_s:,.0f} ({speed.best_tokens_per_s:,.0f}){mark}"


def _verdict(ratio: Ratio) -> str:
    said = f"{ratio.of_medians:.2f} ({ratio.of_bests:.2f})"
    if ratio.bar is None or ratio.passed is None:
        return said
    return f"{said}\nbar {ratio.bar:g}: {_passed(ratio.passed)}"


def _passed(passed: bool) -> str:
    return "pass" if passed else "FAIL"


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(columns)} |",
        f"|{'|'.join(['---'] * len(columns))}|",
        *(f"| {' | '.join(cell.replace(NEW_LINE, ', ') for cell in row)} |" for row in rows),
    ]
