"""The group of subcommands, and the one place where an error becomes a line and a code."""

from __future__ import annotations

import importlib
from typing import Any

import click

from baton.protocol.errors import BatonError, Cancelled, ConfigError, Unavailable

EXIT_FAILED = 1
EXIT_CONFIG = 3
EXIT_UNREACHABLE = 4
EXIT_INTERRUPTED = 130

_COMMANDS = {
    "calibrate": "make the KV codec profile of a checkpoint",
    "chat": "talk with the model in the terminal",
    "complete": "continue a prompt, streaming",
    "serve": "start the cluster of a config file; Ctrl-C drains and ends it",
    "status": "workers, load and KV use of a running cluster",
    "validate": "check a config file: every mistake at once",
    "version": "print the version",
}
"""Name to help line. Kept here so that ``baton --help`` loads none of the modules."""


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"baton.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if not ctx.resilient_parsing and not args[0].startswith("-") and args[0] not in _COMMANDS:
            ctx.fail(f"no command {args[0]!r}; commands: {', '.join(_COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BatonError as exc:
            click.echo(error_text(exc), err=True)
            ctx.exit(exit_code(exc))
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 wrong configuration, "
    "4 no server or no worker reachable, 130 interrupted.",
)
def main() -> None:
    """Baton serves large language models with prefill and decode on separate workers.

    \b
    Examples:
      baton validate -f deploy/examples/local.yaml
      baton serve -f deploy/examples/local.yaml
      baton complete "def fibonacci(n):"
      baton status
    """


def error_text(exc: BatonError) -> str:
    """One ``error: ...`` line per problem, without a traceback."""
    lines = (exc.message.splitlines() or [type(exc).__name__]) if exc.message else [str(exc)]
    text = "\n".join(f"error: {line}" for line in lines)
    notes = [f"hop: {exc.hop}"] if exc.hop else []
    if exc.retryable:
        notes.append("the same call may succeed later")
    return f"{text} [{'; '.join(notes)}]" if notes else text


def exit_code(exc: BatonError) -> int:
    if isinstance(exc, ConfigError):
        return EXIT_CONFIG
    if isinstance(exc, Cancelled):
        return EXIT_INTERRUPTED
    return EXIT_UNREACHABLE if isinstance(exc, Unavailable) else EXIT_FAILED
