"""The shipped `ray up` file: valid for the Ray that is installed, and whole in itself."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError  # type: ignore[import-untyped]
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.load import load_config

ROOT = Path(__file__).parents[2]
ON_PREM = ROOT / "deploy/ray/on-prem.yaml"
MADE_BY_THE_USER = {"~/.ray/auth_token", "dist"}


@pytest.fixture
def shipped() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(ON_PREM.read_text())
    return config


def commands(config: dict[str, Any]) -> list[str]:
    kinds = ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    return [command for kind in kinds for command in config[kind]]


def test_ray_takes_it(shipped: dict[str, Any]) -> None:
    validate_config(prepare_config(shipped))


def test_rays_schema_would_say_so_if_a_key_were_wrong(shipped: dict[str, Any]) -> None:
    prepared = prepare_config(shipped | {"head_start_commands": []})
    with pytest.raises(ValidationError, match="head_start_commands"):
        validate_config(prepared)


def test_what_it_copies_is_in_the_repository(shipped: dict[str, Any]) -> None:
    sources = set(shipped["file_mounts"].values())
    assert sources >= MADE_BY_THE_USER
    missing = [s for s in sources - MADE_BY_THE_USER if not (ROOT / s).is_file()]
    assert not missing


def test_every_command_is_bash(shipped: dict[str, Any]) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    for command in commands(shipped):
        done = subprocess.run([bash, "-n", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_ray_starts_with_a_token_by_an_absolute_path_and_shows_no_dashboard_outside(
    shipped: dict[str, Any],
) -> None:
    starts = [c for c in commands(shipped) if "ray start" in c]
    assert len(starts) == 2
    for start in starts:
        assert "RAY_AUTH_MODE=token" in start
        assert "~/baton/venv/bin/ray start" in start
    assert "--dashboard-host=127.0.0.1" in starts[0]


def test_each_pool_of_the_placement_finds_a_node_that_announces_it(shipped: dict[str, Any]) -> None:
    placement = load_config(ROOT / shipped["file_mounts"]["~/baton/cluster.yaml"])
    assert placement.network.worker_host == "node"
    wanted = {name for pool in placement.pools for name in pool.placement.resources}
    (start,) = [c for c in shipped["worker_start_ray_commands"] if "ray start" in c]
    announced = [_announced(start, address) for address in shipped["provider"]["worker_ips"]]
    assert len(announced) == len(set(announced))
    assert {f'{{"{name}": 1}}' for name in wanted} == set(announced)


def _announced(start: str, address: str) -> str:
    """What --resources a node of that address would get, by running the command's own shell."""
    shell = start.replace("$SSH_CONNECTION", f"10.0.0.9 50000 {address} 22")
    shell = shell.replace("~/baton/venv/bin/ray start", "printf '%s\\n'")
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    (words,) = [w for w in done.stdout.splitlines() if w.startswith("--resources=")]
    return words.removeprefix("--resources=")
