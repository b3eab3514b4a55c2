"""Workers and routers as child processes of this one, without Ray.

For tests, and for machines that have no Ray. Each child ends with its standard input, so
even a killed parent leaves none behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import BinaryIO

import msgspec

from baton.protocol.errors import InternalError, Unavailable, from_code
from baton.protocol.spec import RouterInfo, RouterSpec, RouterStatus, WorkerInfo, WorkerSpec
from cluster.launcher import Loaded
from cluster.process import Command, Reply

STOP_TIMEOUT_S = 5.0
END_TIMEOUT_S = 1.0


class _Child:
    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.process = process
        self._turn = asyncio.Lock()

    @property
    def pid(self) -> int:
        return self.process.pid

    async def ask(self, line: bytes, loaded: Loaded | None = None) -> Reply:
        """Raises the child's BatonError, or Unavailable when the child is gone.

        What it says of its loading on the way to an answer goes to ``loaded``.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        async with self._turn:
            try:
                stdin.write(line + b"\n")
                await stdin.drain()
                while answer := await stdout.readline():
                    reply = msgspec.json.decode(answer, type=Reply)
                    if reply.loaded is None:
                        break
                    if loaded is not None:
                        loaded(*reply.loaded)
            except (BrokenPipeError, ConnectionResetError):
                answer = b""
        if not answer:
            raise Unavailable(f"process {self.name} has ended; its log tells why", hop=self.name)
        if reply.error is not None:
            raise from_code(*reply.error, hop=self.name)
        return reply

    async def command(self, command: Command) -> Reply:
        return await self.ask(msgspec.json.encode(command))

    async def wait(self) -> str:
        code = await self.process.wait()
        return f"exit code {code}" if code >= 0 else f"signal {-code}"

    async def end(self) -> None:
        """At once: what is to be waited for was waited for before. End of input says it
        gently, a kill makes it sure."""
        stdin = self.process.stdin
        assert stdin is not None
        stdin.close()
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()

    async def stop(self, drain_s: float) -> None:
        if self.process.returncode is None:
            try:
                async with asyncio.timeout(drain_s + STOP_TIMEOUT_S):
                    with contextlib.suppress(Unavailable):
                        await self.command(Command(stop_drain_s=drain_s))
                    await self.process.wait()
            except TimeoutError:
                self.process.kill()
        await self.process.wait()
        stdin = self.process.stdin
        assert stdin is not None
        stdin.close()


class ProcessWorker:
    def __init__(self, child: _Child, info: WorkerInfo) -> None:
        self._child = child
        self.info = info

    async def wait(self) -> str:
        return await self._child.wait()

    async def stop(self) -> None:
        await self._child.stop(0.0)


class ProcessRouter:
    def __init__(self, child: _Child, info: RouterInfo) -> None:
        self._child = child
        self.info = info

    async def announce(self, info: WorkerInfo) -> None:
        await self._child.command(Command(announce=info))

    async def worker_gone(self, worker_id: str, incarnation: str) -> None:
        await self._child.command(Command(gone=(worker_id, incarnation)))

    async def status(self) -> RouterStatus:
        status = (await self._child.command(Command(status=True))).status
        assert status is not None
        return status

    async def wait(self) -> str:
        return await self._child.wait()

    async def stop(self, drain_s: float) -> None:
        await self._child.stop(drain_s)


class ProcessLauncher:
    """``log_dir`` takes one log file per process; standard error is inherited without it."""

    module = "cluster.process"
    """That the children run."""

    def __init__(self, log_dir: Path | None = None) -> None:
        self._log_dir = log_dir
        self._children: list[_Child] = []

    async def __aenter__(self) -> ProcessLauncher:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.gather(*(child.end() for child in self._children))

    async def start_worker(self, spec: WorkerSpec, loaded: Loaded) -> ProcessWorker:
        line = msgspec.json.encode(spec)
        child, reply = await self._start(spec.worker_id, "worker", line, loaded)
        if reply.worker is None:
            raise InternalError(f"{spec.worker_id} did not say where it is", hop="launcher")
        return ProcessWorker(child, reply.worker)

    async def start_router(self, spec: RouterSpec) -> ProcessRouter:
        child, reply = await self._start(spec.router_id, "router", msgspec.json.encode(spec))
        if reply.router is None:
            raise InternalError(f"{spec.router_id} did not say where it is", hop="launcher")
        return ProcessRouter(child, reply.router)

    async def _start(
        self, name: str, kind: str, spec: bytes, loaded: Loaded | None = None
    ) -> tuple[_Child, Reply]:
        with contextlib.ExitStack() as stack:
            stderr: BinaryIO | None = None
            if self._log_dir is not None:
                stderr = stack.enter_context((self._log_dir / f"{name}.log").open("ab"))
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self.module,
                kind,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
        child = _Child(name, process)
        self._children.append(child)
        return child, await child.ask(spec, loaded)
