"""Serving under load: disaggregated against colocated, on the same processors."""

from __future__ import annotations

import asyncio
import datetime
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
from rich.console import Console

from baton.protocol.errors import BatonError
from benchmarks import report
from benchmarks.deployments import Deployment, Planned, num_threads, plan_deployments, started
from benchmarks.measure import check, measure, prepare, segment_s, turns
from benchmarks.provenance import provenance
from benchmarks.workload import Workload, load_workload
from cluster.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
WORKLOAD = ROOT / "benchmarks" / "workloads" / "serve_small.toml"
RESULTS = ROOT / "benchmarks" / "results"
CONFIGS = (
    ROOT / "deploy" / "examples" / "local.yaml",
    ROOT / "deploy" / "examples" / "colocated.yaml",
)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "-w",
    "--workload",
    "workload_path",
    type=_FILE,
    default=WORKLOAD,
    help="TOML file: lengths, rates, repeats, limits. Default: workloads/serve_small.toml, 3 min.",
)
@click.option(
    "-f",
    "--config",
    "config_paths",
    type=_FILE,
    multiple=True,
    help="Cluster to start and measure; repeat it to compare, the last one is the baseline. "
    "Default: deploy/examples/local.yaml, then colocated.yaml.",
)
@click.option(
    "--against",
    "addresses",
    metavar="HOST:PORT",
    multiple=True,
    help="Measure what serves at this gRPC address, instead of the default clusters or beside "
    "those of --config.",
)
@click.option(
    "--rate",
    "rates_rps",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    help="Requests per second instead of the workload's; may be repeated.",
)
@click.option("--repeats", type=click.IntRange(min=1), help="Instead of the workload's.")
@click.option("--window-s", type=click.FloatRange(min=0, min_open=True), help="Likewise.")
@click.option("--seed", type=int, help="Likewise.")
@click.option(
    "--out",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    help="Folder for JSON, markdown page and logs of the processes. Default: benchmarks/results.",
)
def main(
    workload_path: Path,
    config_paths: tuple[Path, ...],
    addresses: tuple[str, ...],
    rates_rps: tuple[float, ...],
    repeats: int | None,
    window_s: float | None,
    seed: int | None,
    folder: Path,
) -> None:
    """Measure serving: TTFT, TPOT, TBT, goodput within a limit, errors.

    Starts 1 prefill + 1 decode worker and, beside it, the same engine as two mixed workers,
    one compute thread each. Both are sent the same requests at the same moments, in turn:
    arrivals are Poisson and do not wait for answers. First both must give the same greedy
    tokens; without that there are no numbers.

    \b
    Examples:
      make bench
      python -m benchmarks --rate 4 --repeats 1 --window-s 5
      python -m benchmarks -f my.yaml -f deploy/examples/colocated.yaml
      python -m benchmarks --against 127.0.0.1:50051
    """
    try:
        workload = _changed(load_workload(workload_path), rates_rps, repeats, window_s, seed)
        paths = config_paths or (() if addresses else CONFIGS)
        asyncio.run(_run(workload, plan_deployments(paths), addresses, folder))
    except BaseExceptionGroup as group:
        found = next(_baton_errors(group), None)
        if found is None:
            raise
        raise click.ClickException(str(found)) from group
    except BatonError as exc:
        raise click.ClickException(str(exc)) from exc
    except KeyboardInterrupt:
        click.echo("interrupted: nothing was written, nothing is left running", err=True)
        raise SystemExit(130) from None


def _changed(
    workload: Workload,
    rates_rps: tuple[float, ...],
    repeats: int | None,
    window_s: float | None,
    seed: int | None,
) -> Workload:
    schedule = workload.schedule
    return msgspec.structs.replace(
        workload,
        seed=workload.seed if seed is None else seed,
        schedule=msgspec.structs.replace(
            schedule,
            rates_rps=rates_rps or schedule.rates_rps,
            repeats=repeats or schedule.repeats,
            window_s=window_s or schedule.window_s,
        ),
    )


async def _run(
    workload: Workload, planned: list[Planned], addresses: tuple[str, ...], folder: Path
) -> None:
    origin = provenance()
    with Progress(sys.stderr) as progress:
        _warn(planned, progress)
        async with started(planned, _log_dir(folder), progress.tell) as deployments:
            deployments += [Deployment(address, address) for address in addresses]
            num_turns = sum(1 for _ in turns(workload.schedule, deployments))
            total_s = num_turns * segment_s(workload.schedule)
            progress.tell("cutting prompts from the standard library")
            cutter = await prepare(workload, deployments[0])
            progress.tell("gate: the same greedy tokens from every deployment?")
            gate = await check(workload, deployments, cutter)
            progress.tell(f"gate green; {num_turns} segments, about {total_s:.0f} s")
            segments = await measure(workload, deployments, cutter, progress.tell)
            progress.tell("done; ending what was started")
    result = report.make_result(
        workload,
        origin,
        [_facts(deployment) for deployment in deployments],
        gate,
        segments,
        datetime.datetime.now(datetime.UTC),
    )
    report.show(result, Console(highlight=False))
    for path in report.write(result, folder):
        click.echo(f"written: {path}")


def _log_dir(folder: Path) -> Path:
    """Of this run only; it outlives a run that failed, when it is wanted."""
    logs = folder / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    return logs


def _warn(planned: list[Planned], progress: Progress) -> None:
    threads = {plan.name: num_threads(plan.config) for plan in planned}
    if len(set(threads.values())) > 1:
        said = ", ".join(f"{name} {num}" for name, num in threads.items())
        progress.tell(f"warning: not the same compute threads in all ({said})")


def _facts(deployment: Deployment) -> report.DeploymentFacts:
    config = deployment.config
    if config is None:
        return report.DeploymentFacts(deployment.name, None)
    # Which folder the checkpoint lies in says nothing to others.
    model = msgspec.structs.replace(config.model, path=Path(config.model.path).name)
    shown = msgspec.structs.replace(config, model=model)
    return report.DeploymentFacts(deployment.name, msgspec.to_builtins(shown))


def _baton_errors(group: BaseExceptionGroup[BaseException]) -> Iterator[BatonError]:
    for exc in group.exceptions:
        if isinstance(exc, BaseExceptionGroup):
            yield from _baton_errors(exc)
        elif isinstance(exc, BatonError):
            yield exc


if __name__ == "__main__":
    main()
