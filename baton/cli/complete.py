"""``baton complete``: one prompt, streamed to standard output."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

import click

from baton.cli.options import address, generate_options, sampling
from baton.client import Client, Completion, Stream


@click.command()
@click.argument("prompt")
@sampling
@click.option("--json", "as_json", is_flag=True, help="Print the whole answer as JSON at its end.")
@click.option("--timeline", is_flag=True, help="Then show on stderr where the time went.")
@address
def command(prompt: str, as_json: bool, timeline: bool, address: str, **chosen: Any) -> None:
    """Continue PROMPT; a PROMPT of - is read from standard input.

    \b
    Examples:
      baton complete "def fibonacci(n):" --temperature 0
      baton complete - --max-tokens 64 < half_a_program.py
      baton complete "import " --seed 7 --json --timeline
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    options = generate_options(chosen)
    with Client(address) as client, client.stream(text, **options) as stream:
        completion = stream.completion() if as_json else _print_stream(stream)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(completion), indent=2))
    if timeline:
        _print_timeline(completion)


def _print_stream(stream: Stream) -> Completion:
    with _waiting("waiting for the first token"):
        chunk = next(stream, None)
    ends_line = False
    try:
        while chunk is not None:
            click.echo(chunk.text, nl=False)
            ends_line = chunk.text.endswith("\n") if chunk.text else ends_line
            chunk = next(stream, None)
    finally:
        # Also before an error message: it starts on a line of its own.
        if not ends_line:
            click.echo()
    return stream.completion()


@contextlib.contextmanager
def _waiting(what: str) -> Iterator[None]:
    """A spinner on a terminal's stderr; silence elsewhere."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console  # costs start-up time that scripts need not pay

    with Console(stderr=True).status(what):
        yield


def _print_timeline(completion: Completion) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"request {completion.request_id}", title_justify="left")
    for column in ("hop", "start ms", "took ms", "details"):
        table.add_column(column, justify="right" if "ms" in column else "left")
    found = completion.choices[0].timeline
    for span in found.spans if found is not None else ():
        details = ", ".join(f"{name}={value}" for name, value in span.attributes.items())
        table.add_row(span.name, f"{span.start_ms:.1f}", f"{span.duration_ms:.1f}", details)
    console = Console(stderr=True)
    console.print(table)
    if found is not None:
        tpot = f", TPOT {found.tpot_ms:.1f} ms" if found.tpot_ms is not None else ""
        console.print(
            f"TTFT {found.ttft_ms:.1f} ms{tpot}, {completion.usage.completion_tokens} tokens"
        )
