"""The asking side of one engine process: started once, asked often, stopped in between.

Stopped means SIGSTOP: an engine whose threads spin while they wait would take the processors of
the one that is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from benchmarks.engine.answer import Setup

ROOT = Path(__file__).resolve().parents[2]
MAX_LINE_BYTES = 16 * 2**20
START_TIMEOUT_S = 120.0
OPEN_TIMEOUT_S = 600.0
END_TIMEOUT_S = 5.0


class EngineFailed(Exception):
    """The engine said so, ended, or did not answer in time."""


class EngineProcess:
    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process
        self.idle_bytes = 0
        """Resident when all was imported and nothing loaded."""

    @property
    def pids(self) -> tuple[int, ...]:
        """The process and all that it started."""
        try:
            root = psutil.Process(self._process.pid)
            return (root.pid, *(child.pid for child in root.children(recursive=True)))
        except psutil.NoSuchProcess:
            return ()

    async def open(self, setup: Setup) -> dict[str, Any]:
        """Versions, seconds of loading and bytes of the KV pool; the process is stopped after."""
        await self._read(START_TIMEOUT_S)
        self.idle_bytes = sum(_status_bytes(pid, "VmRSS") for pid in self.pids)
        found = await self._exchange({"op": "open", "setup": asdict(setup)}, OPEN_TIMEOUT_S)
        self.stop()
        return found

    async def ask(self, question: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Runs only while it answers. Raises EngineFailed."""
        self._signal(signal.SIGCONT)
        try:
            return await self._exchange(question, timeout_s)
        finally:
            self.stop()

    def stop(self) -> None:
        """It has stopped, or ended, when this returns: the next one has the processors alone."""
        self._signal(signal.SIGSTOP)
        with contextlib.suppress(ChildProcessError):
            # Only a look: the state stays there for whoever waits for the end.
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def peak_bytes(self) -> int:
        """The most that was ever resident."""
        return sum(_status_bytes(pid, "VmHWM") for pid in self.pids)

    async def _exchange(self, question: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(question).encode() + b"\n")
            await stdin.drain()
        except ConnectionError as exc:
            raise EngineFailed(f"{self.name}: its process ended") from exc
        found = await self._read(timeout_s)
        if "error" in found:
            raise EngineFailed(f"{self.name}: {found['error']}")
        return found

    async def _read(self, timeout_s: float) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        try:
            line = await asyncio.wait_for(stdout.readline(), timeout_s)
        except TimeoutError as exc:
            raise EngineFailed(f"{self.name}: no answer within {timeout_s:g} s") from exc
        if not line:
            code = await self._process.wait()
            raise EngineFailed(f"{self.name}: its process ended with exit code {code}")
        found: dict[str, Any] = json.loads(line)
        return found

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    async def end(self) -> None:
        """It and all that it started are gone when this returns."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), END_TIMEOUT_S)
        except TimeoutError:
            pass
        finally:
            self._signal(signal.SIGKILL)
            await self._process.wait()


@contextlib.asynccontextmanager
async def engine_process(
    name: str, python: str, module: str, environment: Mapping[str, str], log: Path
) -> AsyncIterator[EngineProcess]:
    """``environment`` comes on top of this process's own."""
    process = await start(name, [python, "-m", module], environment, log)
    try:
        yield process
    finally:
        await process.end()


async def start(
    name: str, command: Sequence[str], environment: Mapping[str, str], log: Path
) -> EngineProcess:
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=output,
            cwd=ROOT,
            env={**os.environ, **environment},
            limit=MAX_LINE_BYTES,
            start_new_session=True,  # Ctrl-C in a terminal is for the benchmark, which ends this
        )
    return EngineProcess(name, process)


def _status_bytes(pid: int, field: str) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    for line in text.splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1_024
    return 0
