"""``baton version``."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import click


@click.command()
def command() -> None:
    """Print the version of Baton."""
    for distribution in ("baton-serve", "baton-client"):
        try:
            click.echo(f"{distribution} {version(distribution)}")
        except PackageNotFoundError:
            continue
        return
    click.echo("baton, run from its sources without being installed")
