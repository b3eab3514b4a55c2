"""The result as JSON, as a markdown page and as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.engine.measure import MUCH_FOREIGN_CPU
from benchmarks.engine.report import LeftOut
from benchmarks.peer.cases import CASES, FIGURES, OUTPUT_TOKENS, PUBLISHED_TRANSFER_MS
from benchmarks.peer.gate import Passage
from benchmarks.peer.measure import Window
from benchmarks.peer.results import Ratio, Summary, TransferVerdict
from benchmarks.peer.transfer import Transfer
from benchmarks.provenance import Provenance, slug

FORMAT_VERSION = 1
Rows = tuple[list[str], list[list[str]]]


class Settings(msgspec.Struct, frozen=True):
    """requests: of one window, by number of clients."""

    repeats: int
    seed: int
    quick: bool
    requests: dict[int, int]
    peer_versions: dict[str, str]
    peer_preload: bool


class Result(msgspec.Struct, frozen=True):
    """windows: every request of every one."""

    version: int
    measured_at: str
    provenance: Provenance
    settings: Settings
    checkpoint: dict[str, object]
    systems: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    gate: tuple[Passage, ...]
    summaries: tuple[Summary, ...]
    ratios: tuple[Ratio, ...]
    transfers: tuple[Transfer, ...]
    transfer_verdicts: tuple[TransferVerdict, ...]
    windows: tuple[Window, ...]


def write(result: Result, folder: Path) -> tuple[Path, Path]:
    """``peer_<hardware>_<yyyymm>`` .json and .md; an older result of that name is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    month = result.measured_at[:7].replace("-", "")
    name = f"peer_{slug(result.provenance.hardware)}_{month}"
    as_json, as_markdown = folder / f"{name}.json", folder / f"{name}.md"
    as_json.write_bytes(msgspec.json.encode(result) + b"\n")
    as_markdown.write_text(markdown(result), encoding="utf-8")
    return as_json, as_markdown


def figure_table(result: Result) -> Rows:
    """A row for each case and system."""
    header = ["in/out xclients", "system", "TTFT ms", "TPOT ms", "end to end ms", "requests/s"]
    rows = []
    for case in CASES:
        of_case = [s for s in result.summaries if s.case == case.name]
        for number, s in enumerate(of_case):
            mark = "*" if s.num_noisy else ""
            least, most = min(s.rps_of_repeats), max(s.rps_of_repeats)
            rows.append(
                [
                    "" if number else case.name,
                    s.system,
                    f"{s.ttft_p50_ms:,.0f} / {s.ttft_p90_ms:,.0f}",
                    f"{s.tpot_p50_ms:,.1f} / {s.tpot_p90_ms:,.1f}",
                    f"{s.e2e_p50_ms:,.0f} / {s.e2e_p90_ms:,.0f}",
                    f"{s.rps:.2f} ({least:.2f} to {most:.2f}){mark}",
                ]
            )
    return header, rows


def ratio_table(result: Result) -> Rows:
    """A row for each case, shape and start of the peer: what ours is by the peer's."""
    header = ["ours / vLLM", "case", *(FIGURES), "rps: bar, predicted"]
    of_row: dict[tuple[str, str, str], dict[str, Ratio]] = {}
    for ratio in result.ratios:
        key = (f"{ratio.shape}, {ratio.start}", ratio.case, ratio.shape)
        of_row.setdefault(key, {})[ratio.figure] = ratio
    rows = []
    for (beside, case, _), found in of_row.items():
        rps = found["rps"]
        asked = f"{rps.bar:g}" if rps.bar is not None else "-"
        told = f"{rps.predicted:g}" if rps.predicted is not None else "-"
        cells = [f"{found[f].value:.2f}" + _mark(found[f]) for f in FIGURES]
        rows.append([beside, case, *cells, f"{asked}, {told}"])
    return header, rows


def transfer_table(result: Result) -> Rows:
    header = [
        "KV of 512 tokens",
        "MB",
        "mean ms",
        "median ms",
        "best ms",
        "from first frame ms",
        "how",
    ]
    rows = [
        [
            t.system,
            f"{t.megabytes:.1f}",
            *map(_ms, (t.mean_ms, t.median_ms, t.best_ms, t.whole_ms)),
            t.how,
        ]
        for t in result.transfers
    ]
    return header, rows


def show(result: Result, console: Console) -> None:
    for header, rows in (figure_table(result), ratio_table(result), transfer_table(result)):
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for number, column in enumerate(header):
            table.add_column(column, justify="right" if number > 1 else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in notes(result):
        console.print(line)


def markdown(result: Result) -> str:
    origin = result.provenance
    lines = [
        f"# Beside vLLM, end to end, {origin.hardware.num_cpus} x {origin.hardware.cpu}",
        "",
        f"{result.measured_at}, commit `{origin.commit or 'unknown'}`, Python {origin.python}.",
        "",
        *(f"- {line}" for line in notes(result)),
    ]
    for header, rows in (figure_table(result), ratio_table(result), transfer_table(result)):
        lines += ["", *_markdown_table(header, rows)]
    return "\n".join(lines) + "\n"


def notes(result: Result) -> list[str]:
    settings = result.settings
    requests = ", ".join(f"{num} from {clients}" for clients, num in settings.requests.items())
    versions = ", ".join(f"{k} {v}" for k, v in settings.peer_versions.items())
    found = [
        f"p50 / p90 of the clients' times; answers of {OUTPUT_TOKENS} tokens; requests of a window "
        f"by clients: {requests}; {settings.repeats} interleaved repeats, seed {settings.seed}; "
        "requests/s: median (least to most) of the repeats; ratios above 1: ours is better",
        f"float32, one core a worker, each system's own step budget; {versions}, "
        f"{'with' if settings.peer_preload else 'without'} tcmalloc and libiomp5 preloaded",
        f"the peer's own log said {PUBLISHED_TRANSFER_MS[0]:g} to {PUBLISHED_TRANSFER_MS[1]:g} ms "
        "a transfer on faster cores",
        "gate green: our tokens were written by "
        + "; ".join(
            f"{p.system} ({p.num_tokens} tokens, {p.num_near_ties} near ties)" for p in result.gate
        ),
    ]
    found += [f"left out: {left.name}: {left.reason}" for left in result.left_out]
    noisy = [w for w in result.windows if w.is_noisy]
    if noisy:
        most = max(w.cpu["foreign"] for w in noisy)
        found.append(
            f"noisy: in {len(noisy)} of {len(result.windows)} windows others used more than "
            f"{MUCH_FOREIGN_CPU:.0%} of the machine (at most {most:.0%}), marked *; repeat the run "
            "when it is idle"
        )
    if settings.quick:
        found.append("quick: too few requests to be quoted")
    return found


def _mark(ratio: Ratio) -> str:
    return "" if ratio.passed is not False else " FAIL"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    found = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return found + [f"| {' | '.join(row)} |" for row in rows]
