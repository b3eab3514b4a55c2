"""``baton serve``: the cluster of one config file, until Ctrl-C."""

from __future__ import annotations

from pathlib import Path

import click

from baton.cli.options import config_file
from cluster.serve import LauncherName, run


@click.command()
@config_file
@click.option(
    "--launcher",
    type=click.Choice(["ray", "process"]),
    default="ray",
    show_default=True,
    help="Ray places workers on nodes; process starts them on this machine, without Ray.",
)
@click.option(
    "--ray-address",
    metavar="HOST:PORT",
    help="Join this Ray cluster; auto is the one that this machine is a node of. "
    "Default: start one for this machine alone.",
)
@click.option(
    "--log-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where --launcher process writes one log per worker.",
)
@click.option("--json", "as_json", is_flag=True, help="Print addresses as JSON once it serves.")
def command(
    config_path: Path | None,
    launcher: LauncherName,
    ray_address: str | None,
    log_dir: Path | None,
    as_json: bool,
) -> None:
    """Start the cluster of a config file and serve until Ctrl-C.

    The first Ctrl-C drains: running answers finish, new requests are refused. A second one
    ends everything at once.

    \b
    Examples:
      baton serve -f deploy/examples/local.yaml
      baton serve -f deploy/examples/local.yaml --launcher process --json
      baton serve -f deploy/examples/on-prem.yaml --ray-address auto
    """
    if config_path is None:
        raise click.UsageError("name the file: baton serve -f deploy/examples/local.yaml")
    if launcher == "process" and ray_address is not None:
        raise click.UsageError("--ray-address goes with --launcher ray")
    run(
        config_path,
        launcher=launcher,
        ray_address=ray_address,
        log_dir=log_dir,
        as_json=as_json,
    )
