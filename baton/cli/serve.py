"""``baton serve``: the cluster of one config file, until Ctrl-C."""

from __future__ import annotations

from pathlib import Path

import click

from baton.cli.options import config_file
from cluster.serve import run


@click.command()
@config_file
def command(config_path: Path | None) -> None:
    """Start the cluster of a config file and serve until Ctrl-C.

    The first Ctrl-C drains: running answers finish, new requests are refused. A second one
    ends everything at once.

    \b
    Examples:
      baton serve -f deploy/examples/local.yaml
      baton complete "import os"          (from another terminal)
    """
    if config_path is None:
        raise click.UsageError("name the file: baton serve -f deploy/examples/local.yaml")
    run(config_path)
