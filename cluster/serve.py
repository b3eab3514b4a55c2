"""``baton serve``: bring a cluster up, keep it up, and end it when asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from baton.protocol.config import ClusterConfig
from baton.protocol.errors import Cancelled
from cluster.controller import Controller
from cluster.launcher import Launcher
from cluster.load import load_config
from cluster.process_launcher import ProcessLauncher
from cluster.progress import Progress

LauncherName = Literal["ray", "process"]

log = logging.getLogger(__name__)


def run(
    config_path: Path,
    *,
    launcher: LauncherName = "ray",
    ray_address: str | None = None,
    log_dir: Path | None = None,
    as_json: bool = False,
) -> None:
    """Serve until SIGINT or SIGTERM. The first one drains, the second ends at once.

    Raises ConfigErrors for the file, ConfigError for a port in use or a model that cannot
    be loaded, Unavailable when Ray cannot be joined or has no room.
    """
    config = load_config(config_path)
    asyncio.run(_serve(config, make_launcher(config, launcher, ray_address, log_dir), as_json))


def make_launcher(
    config: ClusterConfig, name: LauncherName, ray_address: str | None, log_dir: Path | None
) -> Launcher:
    if name == "process":
        return ProcessLauncher(log_dir)
    from cluster.ray_launcher import RayLauncher

    return RayLauncher(config, ray_address)


async def _serve(config: ClusterConfig, launcher: Launcher, as_json: bool) -> None:
    stop = _Signals()
    with Progress(sys.stderr) as progress, stop.installed():
        async with running(config, launcher, progress.tell, stop) as controller:
            progress.done(_where(controller))
            if as_json:
                print(json.dumps(_describe(controller)), flush=True)
            supervisor = asyncio.ensure_future(controller.supervise())
            await stop.wait_or(supervisor)
            progress.tell(
                f"draining: running requests have {config.router.drain_timeout_s:.0f} s, "
                "press Ctrl-C again to end at once"
            )
            supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await supervisor
            stopping = asyncio.ensure_future(controller.stop(config.router.drain_timeout_s))
            await stop.wait_or(stopping, signals=2)
        progress.done("stopped")


@contextlib.asynccontextmanager
async def running(
    config: ClusterConfig,
    launcher: Launcher,
    tell: Callable[[str], None],
    stop: _Signals | None = None,
) -> AsyncIterator[Controller]:
    """A started cluster; everything it started is gone afterwards, however it ends."""
    began = time.monotonic()
    stop = stop or _Signals()
    tell("starting processes")
    async with contextlib.AsyncExitStack() as stack:
        await stop.interruptible(stack.enter_async_context(launcher))
        controller = Controller(config, launcher, tell)
        await stop.interruptible(controller.start())
        tell(f"all processes are up after {time.monotonic() - began:.1f} s")
        yield controller


class _Signals:
    """SIGINT and SIGTERM as something to await."""

    def __init__(self) -> None:
        self._count = 0
        self._news = asyncio.Event()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._note)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _note(self) -> None:
        self._count += 1
        self._news.set()

    async def interruptible(self, starting: Coroutine[Any, Any, object]) -> None:
        """Do it, unless a signal comes: then it is cancelled, waited for, and Cancelled raised.

        Waited for also when this task is cancelled: a start must end before its processes do.
        """
        work = asyncio.ensure_future(starting)
        try:
            await self.wait_or(work)
        finally:
            is_interrupted = not work.done()
            if is_interrupted:
                work.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await work
        if is_interrupted:
            raise Cancelled("interrupted while starting; nothing was left running")

    async def wait_or(self, work: asyncio.Future[Any], *, signals: int = 1) -> None:
        """Until that many signals came in all, or the work is done; raises what it raised."""
        work.add_done_callback(lambda _: self._news.set())
        while not work.done() and self._count < signals:
            self._news.clear()
            await self._news.wait()
        if work.done():
            work.result()


def _where(controller: Controller) -> str:
    router = controller.router
    return (
        f"serving  gRPC {router.grpc_address}   HTTP http://{router.http_address}/v1   "
        "(Ctrl-C drains and ends it)"
    )


def _describe(controller: Controller) -> dict[str, object]:
    described: dict[str, object] = msgspec.to_builtins(
        {"router": controller.router, "workers": controller.workers}
    )
    return described
