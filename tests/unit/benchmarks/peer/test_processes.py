"""What was started is gone, with what it started, also when it was stopped."""

import asyncio
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.engine.engine_process import EngineFailed
from benchmarks.peer.processes import Command, free_ports, started, tree, until_healthy
from benchmarks.peer.systems import System

GONE_TIMEOUT_S = 20.0
PARENT = """
import socket, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
socket.create_connection(("127.0.0.1", int(sys.argv[1])))
child.wait()
"""


async def started_and_stopped(log: Path) -> tuple[int, ...]:
    """The process and its child, which both should be gone."""
    is_up = asyncio.Event()

    def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()
        is_up.set()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    port = str(server.sockets[0].getsockname()[1])
    command = Command("p", (sys.executable, "-c", PARENT, port), {})
    async with server, started(command, log) as process:
        await is_up.wait()
        system = System("x", "", "1P+1D", 0, (process.pid,))
        pids = system.pids
        system.pause()
    return pids


def test_children_of_a_stopped_process_end_with_it(tmp_path: Path) -> None:
    pids = asyncio.run(started_and_stopped(tmp_path / "log"))
    assert len(pids) == 2
    # An orphan is reaped by another process, in its time.
    left = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    assert psutil.wait_procs(left, GONE_TIMEOUT_S)[1] == []
    assert tree(pids) == ()


def test_one_that_ends_while_it_is_waited_for_is_named(tmp_path: Path) -> None:
    async def run() -> None:
        log = tmp_path / "log"
        command = Command("p", (sys.executable, "-c", "raise SystemExit(3)"), {})
        async with started(command, log) as process:
            await until_healthy(process, "it", free_ports(1)[0], log)

    with pytest.raises(EngineFailed, match="it ended with exit code 3"):
        asyncio.run(run())


def test_ports_are_all_different() -> None:
    assert len(set(free_ports(8))) == 8
