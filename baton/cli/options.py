"""Options that several subcommands share, so that they read and behave alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from baton.client.types import Options

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_MAX_TOKENS = 128
DEFAULT_CALIBRATION_TEXTS = 96

Command = TypeVar("Command", bound=Callable[..., Any])

address = click.option(
    "--address",
    default=DEFAULT_ADDRESS,
    show_default=True,
    metavar="HOST:PORT",
    help="The gRPC port of the router.",
)

config_file = click.option(
    "-f",
    "--file",
    "config_path",
    type=click.Path(path_type=Path),
    help="The YAML file of the cluster.",
)


def sampling(command: Command) -> Command:
    """How to draw tokens: --max-tokens, --temperature, --top-p, --seed, --stop, --timeout."""
    options = (
        click.option(
            "--max-tokens",
            type=int,
            default=DEFAULT_MAX_TOKENS,
            show_default=True,
            help="End after so many tokens.",
        ),
        click.option("--temperature", type=float, help="0 is greedy. Default: 1."),
        click.option("--top-p", type=float, help="Share of probability mass kept. Default: 1."),
        click.option("--seed", type=int, help="Same seed, same draw. Default: random."),
        click.option("--stop", multiple=True, help="End before this text; may be repeated."),
        click.option("--timeout", type=float, metavar="SECONDS", help="For the whole answer."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def generate_options(chosen: dict[str, Any]) -> Options:
    """What ``sampling`` collected, without what was left to the router."""
    options: Options = {}
    for name, value in chosen.items():
        if value is not None and value != ():
            options[name] = value  # type: ignore[literal-required]
    return options
