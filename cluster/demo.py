"""``make demo``: one prompt through a real cluster, watched on the way.

A local Ray cluster from ``deploy/examples/local.yaml``, a completion streamed through the
gRPC SDK as it is generated, the timeline of that request, and nothing left behind.
"""

from __future__ import annotations

import asyncio
import sys
from importlib.resources import as_file, files

import click
import msgspec
from rich.console import Console
from rich.table import Table

from baton import AsyncClient, Completion
from baton.protocol.config import ClusterConfig
from baton.protocol.errors import BatonError
from cluster.leftovers import Leftovers
from cluster.load import load_config
from cluster.progress import Progress
from cluster.serve import LauncherName, make_launcher, running

PROMPT = '''"""Read a configuration file."""

import json
import os


def read_config(path, default=None):
    """Return the settings that are in the file.'''
NUM_TOKENS = 120
SEED = 1


@click.command(help=__doc__)
@click.option("--prompt", default=PROMPT, help="What to complete.")
@click.option("--max-tokens", default=NUM_TOKENS, show_default=True)
@click.option("--launcher", type=click.Choice(["ray", "process"]), default="ray", show_default=True)
def main(prompt: str, max_tokens: int, launcher: LauncherName) -> None:
    try:
        asyncio.run(demo(prompt, max_tokens, launcher))
    except BatonError as exc:
        raise click.ClickException(str(exc)) from exc
    except KeyboardInterrupt:
        raise click.Abort from None


async def demo(prompt: str, max_tokens: int, launcher: LauncherName) -> None:
    console = Console(highlight=False)
    leftovers = Leftovers()
    with Progress(sys.stderr) as progress:
        progress.tell("reading deploy/examples/local.yaml")
        config = _example()
        lifted = make_launcher(config, launcher, None, None)
        async with running(config, lifted, progress.tell) as controller:
            router = controller.router
            progress.done(f"router {router.grpc_address}, pid {router.pid}")
            for worker in controller.workers:
                progress.done(f"{worker.role} worker {worker.worker_id}, pid {worker.pid}")
            async with AsyncClient(router.grpc_address) as client:
                completion = await _stream(client, console, prompt, max_tokens)
            _show_timeline(console, completion)
            num_processes = leftovers.note()
            await controller.stop(config.router.drain_timeout_s)
    left = leftovers.find()
    if left:
        raise click.ClickException(f"processes were left behind: {left}")
    console.print(f"[dim]all {num_processes} processes have ended, none is left behind[/dim]")


def _example() -> ClusterConfig:
    """The example as it is, but on free ports: a demo must not fail for a busy port."""
    with as_file(files("deploy") / "examples" / "local.yaml") as path:
        config = load_config(path)
    router = msgspec.structs.replace(config.router, grpc_port=0, http_port=0)
    return msgspec.structs.replace(config, router=router)


async def _stream(
    client: AsyncClient, console: Console, prompt: str, max_tokens: int
) -> Completion:
    console.rule("[dim]the prompt (dim) and what the cluster makes of it[/dim]")
    console.print(prompt, style="dim", end="", markup=False)
    async with client.stream(
        prompt, max_tokens=max_tokens, temperature=0.6, top_p=0.95, seed=SEED
    ) as stream:
        async for chunk in stream:
            console.file.write(chunk.text)
            console.file.flush()
        completion = await stream.completion()
    console.print()
    return completion


def _show_timeline(console: Console, completion: Completion) -> None:
    choice = completion.choices[0]
    timeline = choice.timeline
    assert timeline is not None
    console.rule(f"[dim]timeline of {completion.request_id}[/dim]")
    table = Table(box=None, pad_edge=False)
    for name in ("hop", "start ms", "took ms", "what"):
        table.add_column(name, justify="right" if name.endswith("ms") else "left")
    for span in timeline.spans:
        what = "  ".join(f"{key}={value}" for key, value in sorted(span.attributes.items()))
        table.add_row(span.name, f"{span.start_ms:.1f}", f"{span.duration_ms:.1f}", what)
    console.print(table)
    tpot = "-" if timeline.tpot_ms is None else f"{timeline.tpot_ms:.2f} ms"
    console.print(
        f"TTFT {timeline.ttft_ms:.1f} ms   TPOT {tpot}   "
        f"{completion.usage.completion_tokens} tokens, finish: {choice.finish_reason}"
    )


if __name__ == "__main__":
    main()
