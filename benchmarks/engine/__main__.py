"""``make bench-engine``: our engine beside others, on the processors of this machine."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console

from benchmarks.engine import report
from benchmarks.engine.engine_process import EngineFailed
from benchmarks.engine.gate import GateRed
from benchmarks.engine.results import missed
from benchmarks.engine.run import run
from benchmarks.engine.stage import Options
from benchmarks.engine.variants import DTYPES, PEERS
from cluster.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
SCRATCH = ROOT / ".runtime" / "bench-engine"
PEER_FOLDER = ROOT / ".runtime" / "peers"
RESULTS = ROOT / "benchmarks" / "results"
_FOLDER = click.Path(file_okay=False, path_type=Path)


def _names(allowed: tuple[str, ...]) -> Callable[..., tuple[str, ...]]:
    """A callback for options that take a list; ``none`` is the empty one."""

    def parse(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(n for n in value.split(",") if n and n != "none"))
        for name in names:
            if name not in allowed:
                raise click.BadParameter(f"{name!r} is none of {', '.join(allowed)}")
        return names

    return parse


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--peers",
    callback=_names(PEERS),
    default=",".join(PEERS),
    metavar="A,B",
    show_default=True,
    help="What to compare with; none measures ours alone.",
)
@click.option(
    "--dtypes",
    callback=_names(DTYPES),
    default=",".join(DTYPES),
    metavar="A,B",
    show_default=True,
    help="Of every engine; the faster one counts.",
)
@click.option(
    "--threads",
    "num_threads",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Compute threads of every engine.",
)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option(
    "--window-s",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Timed work of one engine on one case in one repeat, at least.",
)
@click.option(
    "--patience-s",
    type=click.FloatRange(min=0),
    default=120.0,
    show_default=True,
    help="How long the whole run may wait for other processes to be quiet, and repeat windows in "
    "which they were not.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the prompts.")
@click.option(
    "--quick",
    is_flag=True,
    help="Under two minutes: float32, one start mode, one short repeat, only peers that are "
    "installed. To see whether all runs, not to quote.",
)
@click.option(
    "--enforce", is_flag=True, help="Exit status 1 when a bar is missed or cannot be judged."
)
@click.option(
    "--peer-dir",
    "peer_folder",
    type=_FOLDER,
    default=PEER_FOLDER,
    help="Where the peers' environments are or are made, one folder each. Default: .runtime/peers.",
)
@click.option(
    "--torch-pip-args",
    default="",
    help="Further arguments of pip for peers, such as an index of CPU builds of torch.",
)
@click.option(
    "--out",
    "folder",
    type=_FOLDER,
    default=RESULTS,
    help="Folder for JSON and markdown page. Default: benchmarks/results.",
)
def main(
    peers: tuple[str, ...],
    dtypes: tuple[str, ...],
    num_threads: int,
    repeats: int,
    window_s: float,
    patience_s: float,
    seed: int,
    quick: bool,
    enforce: bool,
    peer_folder: Path,
    torch_pip_args: str,
    folder: Path,
) -> None:
    """Measure the engine alone: prefill and decode tokens/s and memory, beside other engines.

    Makes a random-weight Llama (32 million parameters), installs the peers, each in an environment
    of its own (a few GB, minutes, once), starts every engine in every dtype and start mode, and
    asks them in turn. First an engine's greedy tokens must be those of transformers (in bfloat16:
    nearly as good); without that it has no numbers. One that is not asked is stopped. An engine
    counts with the dtype and start mode that is fastest for the case. What cannot be installed is
    named and left out.

    \b
    Examples:
      make bench-engine                                  # about 15 minutes
      make bench-engine ARGS="--quick"
      python -m benchmarks.engine --peers vllm --repeats 3
      python -m benchmarks.engine --peers none --threads 1
    """
    options = Options(
        peers=peers,
        dtypes=dtypes[:1] if quick else dtypes,
        num_threads=num_threads,
        repeats=1 if quick else repeats,
        window_s=min(window_s, 0.3) if quick else window_s,
        patience_s=0.0 if quick else patience_s,
        seed=seed,
        quick=quick,
        peer_folder=peer_folder.resolve(),
        scratch=SCRATCH,
        torch_pip_args=torch_pip_args,
    )
    try:
        with Progress(sys.stderr) as progress:
            result = asyncio.run(run(options, progress.tell))
    except (GateRed, EngineFailed) as exc:
        logs = SCRATCH.relative_to(ROOT) / "logs"
        raise click.ClickException(f"{exc} (logs: {logs})") from exc
    except KeyboardInterrupt:
        click.echo("interrupted: nothing was written, nothing is left running", err=True)
        raise SystemExit(130) from None
    report.show(result, Console(highlight=False))
    for path in report.write(result, folder):
        click.echo(f"written: {path}")
    problems = missed(
        result.ratios, result.memory_verdicts, options.peers, [c.name for c in result.cases]
    )
    for line in problems:
        click.echo(f"bar missed: {line}")
    if enforce and problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
