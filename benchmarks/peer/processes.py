"""Processes of a peer: started together, stopped while others are measured, gone at the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.engine.engine_process import EngineFailed

HEALTH_TIMEOUT_S = 600.0
HEALTH_PERIOD_S = 0.25
CONNECT_TIMEOUT_S = 5.0
END_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Command:
    """``environment`` comes on top of this process's own."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]


def free_ports(count: int) -> list[int]:
    """That nobody listened at a moment ago, all different."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            found.append(int(listener.getsockname()[1]))
        return found


def tree(pids: Sequence[int]) -> tuple[int, ...]:
    """These processes, as far as they live, and all that they started."""
    found: dict[int, None] = {}
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            found |= dict.fromkeys([pid, *(c.pid for c in process.children(recursive=True))])
    return tuple(found)


def signal_all(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@contextlib.asynccontextmanager
async def started(command: Command, log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """In a session of its own, so that Ctrl-C is for the benchmark, which ends it and all that it
    started."""
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *command.arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=log.parent,
            env={**os.environ, **command.environment},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    family = tree([process.pid])
    signal_all(family, signal.SIGTERM)
    signal_all(family, signal.SIGCONT)
    try:
        await asyncio.wait_for(process.wait(), END_TIMEOUT_S)
    except TimeoutError:
        pass
    finally:
        # Children may have outlived it, or have been started since.
        signal_all((*family, *tree([process.pid])), signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def until_healthy(
    process: asyncio.subprocess.Process, name: str, port: int, log: Path
) -> None:
    """Asks ``/health`` until it says yes. Raises EngineFailed when the process ends or takes too
    long."""
    end = time.monotonic() + HEALTH_TIMEOUT_S
    while not (await get(port, "/health")).startswith("HTTP/1.1 200"):
        if process.returncode is not None:
            raise EngineFailed(f"{name} ended with exit code {process.returncode}; see {log.name}")
        if time.monotonic() > end:
            raise EngineFailed(f"{name} was not healthy within {HEALTH_TIMEOUT_S:g} s")
        await asyncio.sleep(HEALTH_PERIOD_S)


async def get(port: int, path: str) -> str:
    """The whole answer of a loopback server, head and body; "" when there is none."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n"
                writer.write(head.encode())
                await writer.drain()
                return (await reader.read()).decode(errors="replace")
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return ""
