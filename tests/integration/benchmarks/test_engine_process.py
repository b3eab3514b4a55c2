"""The line to an engine process: answers, failures, and that nothing outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.engine.answer import Setup
from benchmarks.engine.engine_process import ROOT, EngineFailed, engine_process

MODULE = "tests.support.scripted_engine"
PROMPT_BATCHES = [[[1, 2, 3]]]
PREFILL = {"op": "prefill", "batches": PROMPT_BATCHES, "window_s": 0.0}
GONE_TIMEOUT_S = 20.0


def setup(mode: str) -> Setup:
    return Setup(
        checkpoint="none",
        dtype="float32",
        mode=mode,
        num_threads=1,
        pool_tokens=64,
        max_model_len=64,
        max_num_batched_tokens=64,
        max_num_seqs=4,
    )


def scripted(tmp_path: Path) -> Any:
    return engine_process("scripted", sys.executable, MODULE, {}, tmp_path / "log")


async def test_answers_come_through_whatever_is_printed(tmp_path: Path) -> None:
    async with scripted(tmp_path) as engine:
        opened = await engine.open(setup("right"))
        assert opened["versions"] == {"scripted": "1"}
        assert opened["pool_bytes"] == 1_024
        decode = {"op": "decode", "batches": [[[1], [2]]] * 9, "window_s": 0.02}
        found = await engine.ask({**decode, "steps": 5, "warm_steps": 1}, 20.0)
        assert found["rounds"] == [[10, 0.01], [10, 0.01]]  # until the window is full, no more
        assert engine.peak_bytes() >= engine.idle_bytes > 0
    assert "a banner" in (tmp_path / "log").read_text()


async def test_it_is_stopped_unless_it_is_asked(tmp_path: Path) -> None:
    async with scripted(tmp_path) as engine:
        await engine.open(setup("right"))
        (pid,) = engine.pids
        assert psutil.Process(pid).status() == psutil.STATUS_STOPPED
        await engine.ask(PREFILL, 20.0)
        assert psutil.Process(pid).status() == psutil.STATUS_STOPPED


async def test_what_fails_is_said_by_name(tmp_path: Path) -> None:
    async with scripted(tmp_path) as engine:
        with pytest.raises(EngineFailed, match="scripted: ValueError: no such dtype"):
            await engine.open(setup("refuse"))
    assert "Traceback" in (tmp_path / "log").read_text()


async def test_after_a_failure_it_can_be_asked_again(tmp_path: Path) -> None:
    async with scripted(tmp_path) as engine:
        await engine.open(setup("right"))
        with pytest.raises(EngineFailed, match="unknown question"):
            await engine.ask({**PREFILL, "op": "sing"}, 20.0)
        assert len((await engine.ask(PREFILL, 20.0))["rounds"]) == 1


async def test_one_that_ends_is_told_from_one_that_is_silent(tmp_path: Path) -> None:
    async with scripted(tmp_path) as engine:
        await engine.open(setup("die"))
        with pytest.raises(EngineFailed, match="ended with exit code 3"):
            await engine.ask(PREFILL, 20.0)
        with pytest.raises(EngineFailed, match="ended"):
            await engine.ask(PREFILL, 20.0)
    async with scripted(tmp_path) as engine:
        await engine.open(setup("hang"))
        (pid,) = engine.pids
        with pytest.raises(EngineFailed, match="no answer within"):
            await engine.ask(PREFILL, 0.1)
    assert not psutil.pid_exists(pid)


async def test_what_it_started_ends_with_it(tmp_path: Path) -> None:
    async with scripted(tmp_path) as engine:
        await engine.open(setup("parent"))
        pids = engine.pids
        assert len(pids) == 2
        child = psutil.Process(pids[1])
    psutil.wait_procs([child], timeout=GONE_TIMEOUT_S)
    assert not any(map(psutil.pid_exists, pids))


def test_it_ends_with_a_benchmark_that_is_killed_while_it_is_stopped(tmp_path: Path) -> None:
    code = f"""
import asyncio, sys
from pathlib import Path
from tests.integration.benchmarks.test_engine_process import scripted, setup

async def main():
    async with scripted(Path({str(tmp_path)!r})) as engine:
        await engine.open(setup("right"))
        print(engine.pids[0], flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, text=True
    ) as benchmark:
        assert benchmark.stdout is not None
        engine = psutil.Process(int(benchmark.stdout.readline()))
        os.kill(benchmark.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs([engine], timeout=GONE_TIMEOUT_S)
    assert not alive
