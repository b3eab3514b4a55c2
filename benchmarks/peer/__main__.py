"""``make bench-peer``: our whole cluster beside vLLM's, on the processors of this machine."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from baton.protocol.errors import BatonError
from benchmarks.engine.engine_process import EngineFailed
from benchmarks.peer import report
from benchmarks.peer.gate import GateRed
from benchmarks.peer.results import missed
from benchmarks.peer.run import Options, run
from benchmarks.peer.systems import SHAPES, STARTS
from cluster.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
SCRATCH = ROOT / ".runtime" / "bench-peer"
PEER_FOLDER = ROOT / ".runtime" / "peers"
RESULTS = ROOT / "benchmarks" / "results"
_FOLDER = click.Path(file_okay=False, path_type=Path)
T = TypeVar("T")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--start",
    "starts",
    type=click.Choice(STARTS),
    multiple=True,
    help="How vLLM is started; may be repeated. Default: both.",
)
@click.option(
    "--no-control", is_flag=True, help="Leave out the two colocated replicas of both systems."
)
@click.option("--repeats", type=click.IntRange(min=1), default=2, show_default=True)
@click.option(
    "--patience-s",
    type=click.FloatRange(min=0),
    default=90.0,
    show_default=True,
    help="How long the whole run may wait for other processes to be quiet, and repeat windows in "
    "which they were not.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the prompts.")
@click.option(
    "--quick",
    is_flag=True,
    help="One repeat, one request a client, only a peer that is installed. To see whether all "
    "runs, not to quote.",
)
@click.option(
    "--preload/--no-preload",
    default=True,
    show_default=True,
    help="Load tcmalloc and libiomp5 before vLLM, as its installation guide says.",
)
@click.option("--enforce", is_flag=True, help="Exit status 1 when a bar is missed.")
@click.option(
    "--peer-dir",
    "peer_folder",
    type=_FOLDER,
    default=PEER_FOLDER,
    help="Where the peer's environment is or is made. Default: .runtime/peers.",
)
@click.option(
    "--torch-pip-args",
    default="",
    help="Further arguments of pip for the peer, such as an index of CPU builds of torch.",
)
@click.option(
    "--out",
    "folder",
    type=_FOLDER,
    default=RESULTS,
    help="Folder for JSON and markdown page. Default: benchmarks/results.",
)
def main(
    starts: tuple[str, ...],
    no_control: bool,
    repeats: int,
    patience_s: float,
    seed: int,
    quick: bool,
    preload: bool,
    enforce: bool,
    peer_folder: Path,
    torch_pip_args: str,
    folder: Path,
) -> None:
    """Measure 1 prefill + 1 decode worker beside vLLM's, which hands KV over by NIXL.

    Both serve one random-weight Llama (32 million parameters) in float32 over OpenAI-compatible
    HTTP, one core a worker. The same client sends both the same prompts in turn: TTFT, TPOT, end
    to end and requests/s at 128 and 512 tokens in and 32 out, from 1, 8 and 32 clients; from 8 and
    32 also to two colocated replicas of each. First all must write the same greedy tokens. What is
    not measured is stopped.

    \b
    Examples:
      make bench-peer
      make bench-peer ARGS="--quick --start eager --no-control"
      python -m benchmarks.peer --repeats 3 --patience-s 300
    """
    options = Options(
        starts=starts or STARTS,
        shapes=SHAPES[:1] if no_control else SHAPES,
        repeats=1 if quick else repeats,
        patience_s=0.0 if quick else patience_s,
        seed=seed,
        quick=quick,
        preload=preload,
        peer_folder=peer_folder.resolve(),
        scratch=SCRATCH,
        torch_pip_args=torch_pip_args,
    )
    try:
        with Progress(sys.stderr) as progress:
            result = asyncio.run(_until_ended(run(options, progress.tell)))
    except (GateRed, EngineFailed, BatonError) as exc:
        logs = SCRATCH.relative_to(ROOT) / "logs"
        raise click.ClickException(f"{exc} (logs: {logs})") from exc
    except (KeyboardInterrupt, asyncio.CancelledError):
        click.echo("interrupted: nothing was written, nothing is left running", err=True)
        raise SystemExit(130) from None
    report.show(result, Console(highlight=False))
    for path in report.write(result, folder):
        click.echo(f"written: {path}")
    problems = missed(result.ratios, result.transfer_verdicts)
    for line in problems:
        click.echo(f"bar missed: {line}")
    if enforce and problems:
        raise SystemExit(1)


async def _until_ended(work: Coroutine[Any, Any, T]) -> T:
    """SIGTERM ends it as Ctrl-C does: what was started is stopped processes, which nobody else
    would end."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await work


if __name__ == "__main__":
    main()
