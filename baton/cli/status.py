"""``baton status``: what the router and its workers are doing."""

from __future__ import annotations

import dataclasses
import json
import threading

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from baton.cli.options import address
from baton.client import Client, Health, Loads, ModelInfo, WorkerLoad

STALE_AFTER_S = 5.0
"""A report older than this is shown in red: the worker may be gone."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and end.")
@click.option(
    "--watch", type=click.FloatRange(min=0.1), metavar="SECONDS", help="Show again every so often."
)
@address
def command(as_json: bool, watch: float | None, address: str) -> None:
    """Show health, load and KV use of a running cluster.

    \b
    Examples:
      baton status
      baton status --watch 1
      baton status --json | jq '.workers[].num_running'
    """
    if as_json and watch is not None:
        raise click.UsageError("--json prints once; leave out --watch")
    console = Console()
    with Client(address) as client:
        model = client.model_info()
        if as_json:
            click.echo(_json(client.health(), model, client.loads()))
        elif watch is None:
            console.print(_view(address, client.health(), model, client.loads()))
        else:
            _watch(client, model, watch, console)


def _watch(client: Client, model: ModelInfo, interval_s: float, console: Console) -> None:
    """Until Ctrl-C. Raises when the router stops answering."""
    until_interrupted = threading.Event()
    view = _view(client.address, client.health(), model, client.loads())
    with Live(view, console=console, auto_refresh=False) as live:
        while not until_interrupted.wait(interval_s):
            view = _view(client.address, client.health(), model, client.loads())
            live.update(view, refresh=True)


def _json(health: Health, model: ModelInfo, loads: Loads) -> str:
    report = {
        "health": str(health),
        "model": dataclasses.asdict(model),
        **dataclasses.asdict(loads),
    }
    return json.dumps(report, indent=2)


def _view(address: str, health: Health, model: ModelInfo, loads: Loads) -> Group:
    colour = "green" if health is Health.SERVING else "red"
    head = Text.assemble(
        (str(health).replace("_", " "), f"bold {colour}"),
        f"  {model.name} ({model.architecture}, {model.dtype}, {model.max_model_len} tokens)"
        f" at {address}: {loads.num_queued} queued, {loads.num_running} running",
    )
    return Group(head, _table(loads.workers), *_faults(loads.workers))


def _table(workers: tuple[WorkerLoad, ...]) -> Table:
    table = Table()
    for name in ("worker", "role", "state"):
        table.add_column(name)
    for name in ("running", "waiting", "KV used", "preempted", "KV sent", "KV received"):
        table.add_column(name, justify="right")
    table.add_column("transport")
    table.add_column("age", justify="right")
    for worker in workers:
        used = worker.num_blocks - worker.num_free_blocks
        share = used / worker.num_blocks if worker.num_blocks else 0.0
        table.add_row(
            worker.worker_id,
            worker.role,
            worker.state,
            str(worker.num_running),
            str(worker.num_waiting),
            f"{share:.0%} ({used}/{worker.num_blocks})",
            str(worker.num_preemptions),
            human_bytes(worker.kv_bytes_sent),
            human_bytes(worker.kv_bytes_received),
            worker.kv_transport or "-",
            Text(f"{worker.age_s:.1f} s", "red" if worker.age_s > STALE_AFTER_S else ""),
        )
    return table


def _faults(workers: tuple[WorkerLoad, ...]) -> list[Text]:
    return [
        Text(f"{worker.worker_id}: integrity: {fault}", "bold red")
        for worker in workers
        for fault in worker.integrity_errors
    ]


def human_bytes(count: int) -> str:
    """Powers of 1,024, three digits or so: ``0 B``, ``6.5 MiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1_024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1_024
    return f"{size:.1f} TiB"
