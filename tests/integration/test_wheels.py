"""The two wheels: what is in each, and that the small one lives alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
MODEL_FILES = (
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "kv_codec.profile",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


@dataclass(frozen=True)
class Wheel:
    path: Path

    @property
    def names(self) -> frozenset[str]:
        with zipfile.ZipFile(self.path) as archive:
            return frozenset(archive.namelist())

    @property
    def top_level(self) -> set[str]:
        """What lands in site-packages, the wheel's own metadata left out."""
        return {n.split("/")[0] for n in self.names if not n.split("/")[0].endswith(".dist-info")}

    @property
    def requires(self) -> list[Requirement]:
        """Without the extras."""
        with zipfile.ZipFile(self.path) as archive:
            (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
            metadata = Parser().parsestr(archive.read(name).decode())
        found = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
        return [r for r in found if r.marker is None or "extra" not in str(r.marker)]


def build(source: Path, out: Path) -> Wheel:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return Wheel(path)


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    return build(ROOT, tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    return build(ROOT / "deploy" / "client_wheel", tmp_path_factory.mktemp("client"))


def test_top_level_names(serve: Wheel, client: Wheel) -> None:
    print("baton-serve:", *sorted(serve.top_level))
    print("baton-client:", *sorted(client.top_level))
    assert serve.top_level == {
        "baton",
        "cluster",
        "decode_worker",
        "deploy",
        "kv_transfer",
        "prefill_worker",
        "router",
    }
    assert client.top_level == {"baton"}


def test_the_serve_wheel_brings_the_model_and_the_examples(serve: Wheel) -> None:
    assert {f"deploy/models/baton-tiny/{name}" for name in MODEL_FILES} <= serve.names
    assert {f"deploy/examples/{name}.yaml" for name in ("local", "colocated")} <= serve.names
    assert "baton/py.typed" in serve.names
    assert any(name.endswith("licenses/LICENSE") for name in serve.names)
    assert not [name for name in serve.names if "client_wheel" in name or "__pycache__" in name]


def test_the_model_is_found_by_name_from_the_wheel(serve: Wheel, tmp_path: Path) -> None:
    """The wheel's contents alone on the path, far from this checkout."""
    installed = tmp_path / "site"
    with zipfile.ZipFile(serve.path) as archive:
        archive.extractall(installed)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from baton.checkpoint.find import resolve\n"
        "from baton.checkpoint.spec import load_spec\n"
        "folder = resolve('baton-tiny'); print(folder, load_spec(folder).vocab_size)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(installed)],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(installed / "deploy" / "models" / "baton-tiny"), "2048"]


def test_the_serve_wheel_holds_every_module_of_the_tree(serve: Wheel) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", *sorted(serve.top_level)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("this tree is not a git checkout: there is no list of its files to compare")
    tracked = {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}
    assert {n for n in tracked if not n.startswith("deploy/client_wheel")} <= serve.names


def test_the_client_wheel_holds_the_sdk_and_no_more(client: Wheel) -> None:
    folders = {"/".join(n.split("/")[:2]) for n in client.names if n.startswith("baton/")}
    assert folders == {
        "baton/__init__.py",
        "baton/api",
        "baton/client",
        "baton/protocol",
        "baton/py.typed",
    }
    assert {n for n in client.names if n.startswith("baton/protocol/")} == {
        f"baton/protocol/{name}.py" for name in ("__init__", "errors", "ids", "slo")
    }
    assert any(name.endswith("licenses/LICENSE") for name in client.names)
    assert not [name for name in client.names if "__pycache__" in name]
    assert {requirement.name for requirement in client.requires} == {"grpcio", "protobuf"}


def test_versions_and_bounds_agree(serve: Wheel, client: Wheel) -> None:
    projects = [
        tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
        for folder in (".", "deploy/client_wheel")
    ]
    assert projects[0]["version"] == projects[1]["version"]
    of_serve = {requirement.name: requirement for requirement in serve.requires}
    for requirement in client.requires:
        assert str(requirement) == str(of_serve[requirement.name])


def test_bounds_reach_down_to_what_the_stubs_were_generated_with(client: Wheel) -> None:
    stubs = ROOT / "baton" / "api" / "v1"
    grpc = re.search(
        r"GRPC_GENERATED_VERSION = '([\d.]+)'", (stubs / "baton_pb2_grpc.py").read_text()
    )
    protobuf = re.search(r"Protobuf Python Version: ([\d.]+)", (stubs / "baton_pb2.py").read_text())
    assert grpc is not None
    assert protobuf is not None
    generated = {"grpcio": Version(grpc[1]), "protobuf": Version(protobuf[1])}
    for requirement in client.requires:
        (lowest,) = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
        assert lowest >= generated[requirement.name], "older ones refuse to load these stubs"


@pytest.fixture(scope="module")
def fresh_python(client: Wheel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with baton-client and what it asks for."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    reachable = subprocess.run(
        [*pip, "download", "--no-deps", "--dest", str(folder / "probe"), "protobuf"],
        capture_output=True,
        text=True,
        check=False,
    )
    if reachable.returncode != 0 and os.environ.get("CI") != "true":
        reason = reachable.stderr.strip().splitlines()[-1]
        pytest.skip(f"no package index can be reached, so nothing can be installed: {reason}")
    done = subprocess.run(
        [*pip, "install", str(client.path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return python


def test_the_client_installs_with_grpcio_and_protobuf_alone(fresh_python: Path) -> None:
    listed = subprocess.run(
        [str(fresh_python), "-m", "pip", "--disable-pip-version-check", "list", "--format=json"],
        capture_output=True,
        text=True,
        check=True,
    )
    installed = {package["name"].replace("_", "-") for package in json.loads(listed.stdout)}
    # typing-extensions is grpcio's own; pip and setuptools come with the environment.
    assert installed - {"pip", "setuptools", "typing-extensions"} == {
        "baton-client",
        "grpcio",
        "protobuf",
    }


def test_the_client_imports_and_fails_well_without_a_server(
    fresh_python: Path, tmp_path: Path
) -> None:
    script = (
        "import sys, baton\n"
        "before = set(sys.modules)\n"
        "from baton import AsyncClient, BatonError, Client\n"
        "try:\n"
        "    with Client('127.0.0.1:9', max_retries=0, timeout=5) as client:\n"
        "        client.generate('x', max_tokens=1)\n"
        "except BatonError as exc:\n"
        "    print(type(exc).__name__, exc.hop)\n"
        "import importlib.util\n"
        "print([n for n in ('router', 'cluster', 'deploy', 'msgspec', 'torch')"
        " if importlib.util.find_spec(n)])\n"
        "print(baton.__file__)\n"
    )
    # -I: neither the current folder nor PYTHONPATH, so nothing of this tree can help.
    done = subprocess.run(
        [str(fresh_python), "-I", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    error, others, file = done.stdout.splitlines()
    assert error == "Unavailable client"
    assert others == "[]"
    assert Path(file).is_relative_to(fresh_python.parents[1])
