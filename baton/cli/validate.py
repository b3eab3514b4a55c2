"""``baton validate``: every mistake of a config file at once."""

from __future__ import annotations

import json
from pathlib import Path

import click

from baton.cli.options import config_file
from baton.cli.root import EXIT_CONFIG
from cluster.load import load_config
from cluster.problems import ConfigErrors


@click.command()
@config_file
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print {ok, problems} as JSON.")
@click.pass_context
def command(ctx: click.Context, config_path: Path | None, file: Path | None, as_json: bool) -> None:
    """Check a config file and the checkpoint it names; starts nothing.

    \b
    Examples:
      baton validate deploy/examples/local.yaml
      baton validate -f my.yaml --json | jq .problems
    """
    path = config_path or file
    if path is None:
        raise click.UsageError("name the file: baton validate deploy/examples/local.yaml")
    try:
        config = load_config(path)
    except ConfigErrors as exc:
        if not as_json:
            raise
        click.echo(json.dumps({"ok": False, "problems": exc.to_json()}, indent=2))
        ctx.exit(EXIT_CONFIG)
    if as_json:
        click.echo(json.dumps({"ok": True, "problems": []}))
        return
    pools = ", ".join(f"{pool.name} ({pool.num_replicas} x {pool.role})" for pool in config.pools)
    click.echo(f"{path} is valid: model {config.model.path}; pools {pools}")
