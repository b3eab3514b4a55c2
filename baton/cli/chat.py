"""``baton chat``: a conversation in the terminal."""

from __future__ import annotations

import contextlib
from typing import Any

import click

from baton.cli.options import address, generate_options, sampling
from baton.cli.root import error_text
from baton.client import ChatMessage, Client
from baton.client.types import Options
from baton.protocol.errors import BatonError, Cancelled

HELP = "Ctrl-C stops an answer, Ctrl-D quits, /reset forgets the conversation."


@click.command()
@click.option("--system", help="A system message that opens the conversation.")
@sampling
@address
def command(system: str | None, address: str, **chosen: Any) -> None:
    """Talk with the model. Ctrl-C stops an answer, Ctrl-D quits.

    \b
    Examples:
      baton chat
      baton chat --system "You write Python." --temperature 0.2
    """
    # Gives input() its history and line editing; some builds of Python come without it.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401

    options = generate_options(chosen)
    opening = [ChatMessage(role="system", content=system)] if system else []
    with Client(address) as client:
        click.echo(f"{client.model_info().name} at {address}. {HELP}")
        _converse(client, opening, options)


def _converse(client: Client, opening: list[ChatMessage], options: Options) -> None:
    messages = list(opening)
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo(f"\n{HELP}")
            continue
        if said == "/reset":
            messages = list(opening)
        elif said:
            messages = _take_turn(client, messages, said, options)


def _take_turn(
    client: Client, messages: list[ChatMessage], said: str, options: Options
) -> list[ChatMessage]:
    """The conversation with the answer; without this turn if the answer failed."""
    asked = [*messages, ChatMessage(role="user", content=said)]
    answer = ""
    with client.chat_stream(asked, **options) as stream:
        try:
            for chunk in stream:
                click.echo(chunk.text, nl=False)
                answer += chunk.text
        except (KeyboardInterrupt, Cancelled):
            click.echo(" [stopped]")
        except BatonError as exc:
            click.echo()
            click.echo(error_text(exc), err=True)
            return messages
        else:
            click.echo()
    return [*asked, ChatMessage(role="assistant", content=answer)]
