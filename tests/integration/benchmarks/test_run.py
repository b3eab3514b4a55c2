"""The whole run with scripted engines, and what is done about peers that cannot be had."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.engine import run as module
from benchmarks.engine.cases import CASES
from benchmarks.engine.environments import PeerEnvironment, Unavailable, preload_paths, python_of
from benchmarks.engine.gate import GateRed
from benchmarks.engine.run import run
from benchmarks.engine.stage import Options
from benchmarks.engine.variants import EnginePlan
from tests.integration.benchmarks.test_engine_process import MODULE

MISSING = PeerEnvironment(name="missing", package="missing", version="1")


@pytest.fixture(autouse=True)
def _no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "make_checkpoint", lambda folder: folder)


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(
        peers=("vllm", "transformers"),
        dtypes=("float32",),
        num_threads=1,
        repeats=2,
        window_s=0.01,
        patience_s=0.0,
        seed=1,
        quick=True,
        peer_folder=tmp_path / "peers",
        scratch=tmp_path / "scratch",
        torch_pip_args="",
    )


def play(monkeypatch: pytest.MonkeyPatch, folder: Path, **modes: str) -> None:
    """Scripted engines instead of the real ones, peers in environments that are there."""
    plans = {}
    for name, mode in modes.items():
        environment = None
        if name != "baton":
            environment = PeerEnvironment(name=name, package="psutil", version=version("psutil"))
            wrapper(folder / name / "bin" / "python", f'exec {sys.executable} "$@"')
        plans[name] = EnginePlan(name, MODULE, environment, ("float32",), (mode,), {})
    monkeypatch.setattr("benchmarks.engine.stage.PLANS", plans)


def wrapper(path: Path, line: str) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return path


async def test_a_run_has_a_gate_all_cases_and_all_engines(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, options.peer_folder, baton="right", vllm="right", transformers="right")
    told: list[str] = []
    result = await run(options, told.append)
    names = [f"{name} float32 right" for name in ("baton", "vllm", "transformers")]
    assert [e.variant for e in result.engines] == names
    assert [gate.engine for gate in result.gate] == names
    assert {(s.variant, s.case) for s in result.speeds} == {
        (n, c.name) for n in names for c in CASES
    }
    assert all(len(s.repeats_tokens_per_s) == 2 for s in result.speeds)
    of_decode = [r for r in result.ratios if r.case == "decode x8"]
    assert [r.peer for r in of_decode] == ["vllm", "transformers"]
    assert of_decode[0].of_medians == pytest.approx(1.0)  # both are scripted to be equally fast
    assert [m.pool_filled for m in result.memory] == [True] * 3
    assert result.left_out == ()
    assert any("gate green; 3 engine processes are ready" in line for line in told)
    logs = {path.name for path in (options.scratch / "logs").iterdir()}
    assert {f"{name.replace(' ', '-')}.log" for name in names} <= logs


async def test_no_numbers_on_a_red_gate(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, options.peer_folder, baton="wrong", transformers="right")
    with pytest.raises(GateRed, match="baton float32 wrong: token 1 after prompt 0"):
        await run(options, lambda _: None)


async def test_a_peer_that_writes_other_tokens_is_left_out_too(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, options.peer_folder, baton="right", vllm="wrong", transformers="right")
    result = await run(options, lambda _: None)
    assert [e.engine for e in result.engines] == ["baton", "transformers"]
    assert [left.name for left in result.left_out] == ["vllm float32 wrong"]
    assert "whose logit is 2.5000 higher" in result.left_out[0].reason


async def test_peers_that_cannot_be_had_are_named_and_left_out(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, options.peer_folder, baton="right", vllm="refuse", transformers="right")
    (options.peer_folder / "transformers" / "bin" / "python").unlink()
    result = await run(options, lambda _: None)
    assert [e.engine for e in result.engines] == ["baton"]
    assert [left.name for left in result.left_out] == ["vllm float32 refuse", "transformers"]
    assert "ValueError: no such dtype" in result.left_out[0].reason
    assert "not installed in transformers/" in result.left_out[1].reason
    assert result.ratios == ()


async def test_an_installation_that_fails_says_its_last_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = wrapper(tmp_path / "bin" / "python", "echo 'ERROR: the index is down'; echo bye; exit 1")
    monkeypatch.setattr("benchmarks.engine.environments.sys.executable", str(fake))
    told: list[str] = []
    with pytest.raises(Unavailable, match="installing an environment failed: ERROR: the index"):
        await python_of(
            MISSING, tmp_path / "peers", tmp_path / "log", "", told.append, may_install=True
        )
    assert told == ["missing: [1/3] installing an environment"]


async def test_libraries_to_preload_are_found_in_the_environment(tmp_path: Path) -> None:
    python = wrapper(tmp_path / "home" / "bin" / "python", "exit 1")
    library = tmp_path / "home" / "lib" / "libprobe.so"
    library.parent.mkdir()
    library.touch()
    log = tmp_path / "log"
    assert await preload_paths(["libprobe.so"], python, tmp_path, log) == [str(library)]
    with pytest.raises(Unavailable, match=r"libother\.so is not here"):
        await preload_paths(["libprobe.so", "libother.so"], python, tmp_path, log)
