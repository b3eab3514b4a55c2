"""One worker or router in a bare process: ``python -m cluster.process worker|router``.

The parent writes one JSON object a line to standard input, the spec first; this process
answers one line to each on standard output. End of input means that the parent is gone,
and ends this process: nothing is left behind. Standard error carries the log.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from baton.protocol.errors import BatonError, RankLost
from baton.protocol.spec import RouterInfo, RouterSpec, RouterStatus, WorkerInfo, WorkerSpec

log = logging.getLogger(__name__)


class Reply(msgspec.Struct, kw_only=True):
    """``error`` is (code, message); else the answer is in the field that fits the command.

    loaded: (bytes of weights loaded, bytes in all); an answer is still to come.
    """

    error: tuple[str, str] | None = None
    worker: WorkerInfo | None = None
    router: RouterInfo | None = None
    status: RouterStatus | None = None
    loaded: tuple[int, int] | None = None


class Command(msgspec.Struct, kw_only=True):
    """One of these fields is set."""

    announce: WorkerInfo | None = None
    gone: tuple[str, str] | None = None
    status: bool = False
    stop_drain_s: float | None = None


async def _stdin() -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=2**20)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


def _answer(reply: Reply) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(reply) + b"\n")
    sys.stdout.buffer.flush()


def _error(exc: BatonError) -> Reply:
    return Reply(error=(exc.code, exc.message))


def _tell_loaded() -> Callable[[int, int], None]:
    """One line per hundredth. Nothing else is written to standard output meanwhile."""
    told = -1

    def loaded(done_bytes: int, total_bytes: int) -> None:
        nonlocal told
        hundredth = 100 * done_bytes // total_bytes
        if hundredth > told:
            told = hundredth
            _answer(Reply(loaded=(done_bytes, total_bytes)))

    return loaded


async def run_worker(stdin: asyncio.StreamReader) -> None:
    from cluster.instance import WorkerInstance

    instance = WorkerInstance(msgspec.json.decode(await stdin.readline(), type=WorkerSpec))
    try:
        info = await instance.start(_tell_loaded())
    except BatonError as exc:
        _answer(_error(exc))
        return
    _answer(Reply(worker=info))
    try:
        await _until_stopped(_read_commands(stdin, lambda command: Reply()), instance.wait())
    except RankLost as exc:
        log.error("%s ends: %s", info.worker_id, exc.message)
        sys.exit(1)
    await instance.stop()


async def run_router(stdin: asyncio.StreamReader) -> None:
    from router.service import RouterService

    spec = msgspec.json.decode(await stdin.readline(), type=RouterSpec)
    try:
        service = RouterService(spec)
        info = await service.start()
    except BatonError as exc:
        _answer(_error(exc))
        return
    _answer(Reply(router=info))
    drain_s = 0.0

    def obey(command: Command) -> Reply:
        nonlocal drain_s
        if command.announce is not None:
            service.announce(command.announce)
        if command.gone is not None:
            service.worker_gone(*command.gone)
        if command.stop_drain_s is not None:
            drain_s = command.stop_drain_s
        return Reply(status=service.status() if command.status else None)

    await _until_stopped(_read_commands(stdin, obey), service.wait())
    await service.stop(drain_s)


async def _read_commands(stdin: asyncio.StreamReader, obey: Any) -> None:
    while line := await stdin.readline():
        command = msgspec.json.decode(line, type=Command)
        _answer(obey(command))
        if command.stop_drain_s is not None:
            return


async def _until_stopped(*ways: Any) -> None:
    """Until the parent says stop or is gone, a signal comes, or the service ends."""
    loop = asyncio.get_running_loop()
    signalled = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, signalled.set)
    loop.add_signal_handler(signal.SIGINT, signalled.set)
    tasks = [loop.create_task(way) for way in (*ways, signalled.wait())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


async def _main(kind: str) -> None:
    stdin = await _stdin()
    await (run_worker(stdin) if kind == "worker" else run_router(stdin))


if __name__ == "__main__":
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    if sys.argv[1:] not in (["worker"], ["router"]):
        sys.exit("usage: python -m cluster.process worker|router  (JSON on standard input)")
    asyncio.run(_main(sys.argv[1]))
