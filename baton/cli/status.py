"""``baton status``: what the router and its workers are doing."""

from __future__ import annotations

import dataclasses
import json
import threading

import click
from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from baton.cli.options import address
from baton.client import Client, Health, Loads, ModelInfo, WorkerLoad

STALE_AFTER_S = 5.0
"""A report older than this is pointed out: the worker may be gone."""


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
    links = [line for worker in loads.workers for line in _links(worker)]
    return Group(head, _table(loads.workers), *links, *_remarks(loads.workers))


def _table(workers: tuple[WorkerLoad, ...]) -> Table:
    # Fits 80 columns with the names and figures of a small cluster.
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in ("worker", "role", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("run", "wait", "KV used", "KV sent", "KV got"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("age", justify="right", no_wrap=True)
    for worker in workers:
        used = worker.num_blocks - worker.num_free_blocks
        share = used / worker.num_blocks if worker.num_blocks else 0.0
        table.add_row(
            worker.worker_id,
            worker.role,
            worker.state,
            str(worker.num_running),
            str(worker.num_waiting),
            f"{share:.0%}",
            human_bytes(worker.kv_bytes_sent),
            human_bytes(worker.kv_bytes_received),
            f"{worker.age_s:.1f}s",
        )
    return table


def _links(worker: WorkerLoad) -> list[Text]:
    """What carries its KV to each peer, and why that; and what brought it, whoever sent it."""
    lines = []
    for link in worker.kv_links:
        way = f"-> {link.peer}" if link.peer else "<- peers"
        said = f"{worker.worker_id} {way}: {link.transport}, {human_bytes(link.num_bytes)}"
        lines.append(Text(f"{said} ({link.reason})" if link.reason else said))
        if link.codecs:
            rate = f"{human_bytes(link.bytes_per_s)}/s"
            lines.append(Text(f"  frames: {link.codecs}; the link is taken for {rate}"))
        if link.num_predicted and link.actual_s:
            off = f"{link.error_s / link.actual_s:.0%}"
            lines.append(Text(f"  {link.num_predicted} hand-overs, predicted to {off}"))
    return lines


def _remarks(workers: tuple[WorkerLoad, ...]) -> list[Text]:
    """What is worth a line only when it happened."""
    lines = []
    for worker in workers:
        counts = (
            ("preempted", worker.num_preemptions),
            ("swapped out", worker.num_swapped_out),
            ("parked", worker.num_parked),
            ("held back by a full peer", worker.num_backpressured),
        )
        said = ", ".join(f"{count} {what}" for what, count in counts if count)
        if worker.age_s > STALE_AFTER_S:
            old = f"{worker.worker_id}: last report {worker.age_s:.1f} s ago"
            lines.append(Text(old, "bold red"))
        if said:
            lines.append(Text(f"{worker.worker_id}: {said}", "yellow"))
        spared = (
            ("prefix cache", worker.num_cache_hit_tokens, worker.num_cache_queried_tokens),
            ("guesses", worker.num_accepted_draft_tokens, worker.num_draft_tokens),
        )
        won = [f"{what} {_of(part, whole)}" for what, part, whole in spared if whole]
        if won:
            lines.append(Text(f"{worker.worker_id}: tokens spared by {', by '.join(won)}"))
        lines += [
            Text(f"{worker.worker_id}: integrity: {fault}", "bold red")
            for fault in worker.integrity_errors
        ]
    return lines


def _of(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.0%})"


def human_bytes(count: int) -> str:
    """Powers of 1,024, two or three digits: ``0 B``, ``6.5 MiB``, ``118 GiB``."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1_024 and len(units) > 1:
        size /= 1_024
        units.pop(0)
    return f"{size:.1f} {units[0]}" if units[0] != "B" and size < 10 else f"{size:.0f} {units[0]}"
