"""The lock files hold what pyproject.toml asks for, with hashes and without addresses."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = ("requirements.lock", "requirements-dev.lock")


def pins(name: str) -> dict[str, tuple[str, str]]:
    """Package to (version, marker); fails on a line that is no pin, hash or comment."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        if re.match(r"\s*#", line):
            continue
        pin = re.fullmatch(r"([a-z0-9-]+)==(\S+?)(?: ; (.*?))?(?: \\)?", line)
        if pin is None:
            assert re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}(?: \\)?", line), line
            continue
        found[pin[1]] = (pin[2], pin[3] or "")
    return found


@pytest.mark.parametrize("name", [*LOCKS, "requirements-torch.lock"])
def test_no_address_and_no_path(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "://" not in text
    assert "--index" not in text
    assert "--find-links" not in text
    assert " @ " not in text


@pytest.mark.parametrize("name", LOCKS)
def test_every_pin_has_a_hash(name: str) -> None:
    blocks = re.split(r"^(?=[a-z0-9])", (ROOT / name).read_text(), flags=re.MULTILINE)[1:]
    # A package may be pinned twice, for different versions of Python.
    assert {block.split("==")[0] for block in blocks} == set(pins(name))
    assert [block.split()[0] for block in blocks if "--hash=sha256:" not in block] == []


def test_torch_is_pinned_alone_and_without_a_hash() -> None:
    assert pins("requirements-torch.lock") == {"torch": ("2.13.0", "")}
    assert "triton" not in pins("requirements.lock")
    for name in LOCKS:
        assert "torch" not in pins(name)
        assert not [package for package in pins(name) if package.startswith("nvidia-")]


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_what_is_asked_for_is_locked(python: str) -> None:
    torch = pins("requirements-torch.lock")
    dev = PROJECT["optional-dependencies"]["dev"]
    for name, wanted in zip(
        LOCKS, (PROJECT["dependencies"], PROJECT["dependencies"] + dev), strict=True
    ):
        locked = pins(name) | torch
        for requirement in map(Requirement, wanted):
            version, marker = locked[requirement.name]
            assert requirement.specifier.contains(version), f"{requirement} is locked at {version}"
            assert not marker or Marker(marker).evaluate({"python_version": python})


def test_both_locks_agree() -> None:
    served = {package: version for package, (version, _) in pins("requirements.lock").items()}
    dev = {package: version for package, (version, _) in pins("requirements-dev.lock").items()}
    assert served.items() <= dev.items()
