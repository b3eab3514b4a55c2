"""The load client as a child process; it ends with its standard input."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from benchmarks.load_job import MAX_LINE_BYTES, Done, Job, Reply, RequestRecord, Started

ROOT = Path(__file__).resolve().parents[1]
STOP_TIMEOUT_S = 2.0


class LoadProcess:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    async def start(self, job: Job) -> None:
        """Returns when the clock of the job has begun to run."""
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(msgspec.json.encode(job) + b"\n")
        await stdin.drain()
        reply = await self._read()
        assert isinstance(reply, Started)

    async def result(self) -> tuple[RequestRecord, ...]:
        reply = await self._read()
        assert isinstance(reply, Done)
        return reply.records

    async def _read(self) -> Reply:
        stdout = self._process.stdout
        assert stdout is not None
        line = await stdout.readline()
        if not line:
            code = await self._process.wait()
            raise RuntimeError(f"the load client ended with exit code {code}")
        reply: Reply = msgspec.json.decode(line, type=Reply)
        return reply


@contextlib.asynccontextmanager
async def load_process() -> AsyncIterator[LoadProcess]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.load_client",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        limit=MAX_LINE_BYTES,
        start_new_session=True,  # Ctrl-C in a terminal is for the benchmark, which ends this
    )
    try:
        yield LoadProcess(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()
