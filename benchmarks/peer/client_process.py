"""The client as a child process; it ends with its standard input."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from benchmarks.peer.job import MAX_LINE_BYTES, Answered, Done, Job

ROOT = Path(__file__).resolve().parents[2]
STOP_TIMEOUT_S = 2.0


class Client:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    async def run(self, job: Job) -> tuple[Answered, ...]:
        """One answer a body, in their order."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(msgspec.json.encode(job) + b"\n")
        await stdin.drain()
        line = await stdout.readline()
        if not line:
            code = await self._process.wait()
            raise RuntimeError(f"the client process ended with exit code {code}")
        return msgspec.json.decode(line, type=Done).answers


@contextlib.asynccontextmanager
async def client_process() -> AsyncIterator[Client]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.peer.client",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        limit=MAX_LINE_BYTES,
        start_new_session=True,  # Ctrl-C in a terminal is for the benchmark, which ends this
    )
    try:
        yield Client(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()
