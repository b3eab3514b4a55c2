"""One cluster of one config: starts it, restarts what dies, tells the router, stops it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator

from baton.protocol.config import ClusterConfig
from baton.protocol.errors import BatonError, Unavailable
from baton.protocol.spec import RouterInfo, RouterSpec, WorkerInfo, WorkerSpec
from cluster.launcher import Launcher, RouterHandle, WorkerHandle

log = logging.getLogger(__name__)

WATCH_PERIOD_S = 1.0
READY_POLL_S = 0.05
STILL_LOADING_S = 2.0
READY_TIMEOUT_S = 30.0
FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 10.0


def worker_specs(config: ClusterConfig) -> Iterator[WorkerSpec]:
    """One per replica: ``pool-0``, ``pool-1`` ..."""
    for pool in config.pools:
        for index in range(pool.num_replicas):
            yield WorkerSpec(
                worker_id=f"{pool.name}-{index}",
                pool=pool,
                model=config.model,
                kv_transfer=config.kv_transfer,
                host=config.network.worker_host,
            )


class Controller:
    """``tell`` gets one line for each thing that a person who waits wants to know."""

    def __init__(
        self, config: ClusterConfig, launcher: Launcher, tell: Callable[[str], None]
    ) -> None:
        self._config = config
        self._launcher = launcher
        self._tell = tell
        self._router: RouterHandle | None = None
        self._workers: dict[str, WorkerHandle] = {}

    @property
    def router(self) -> RouterInfo:
        assert self._router is not None
        return self._router.info

    @property
    def workers(self) -> list[WorkerInfo]:
        return [handle.info for handle in self._workers.values()]

    async def start(self) -> None:
        """All processes at once; raises the first BatonError that one of them met."""
        with _first_baton_error():
            async with asyncio.TaskGroup() as group:
                group.create_task(self._start_router())
                for spec in worker_specs(self._config):
                    group.create_task(self._start_worker(spec))
        assert self._router is not None
        for handle in self._workers.values():
            await self._router.announce(handle.info)
        await self._until_ready(self._router)

    async def _until_ready(self, router: RouterHandle) -> None:
        end = asyncio.get_running_loop().time() + READY_TIMEOUT_S
        while reason := (await router.status()).not_ready:
            if asyncio.get_running_loop().time() > end:
                addresses = ", ".join(f"{w.worker_id} at {w.address}" for w in self.workers)
                raise Unavailable(
                    f"not ready after {READY_TIMEOUT_S:.0f} s: {reason}. Can the router reach "
                    f"{addresses}? The processes' logs tell more",
                    hop="router",
                )
            await asyncio.sleep(READY_POLL_S)

    async def _start_router(self) -> None:
        spec = RouterSpec(
            router_id="router-0",
            model=self._config.model,
            config=self._config.router,
            kv_quality=self._config.kv_transfer.quality_floor,
        )
        self._router = await self._launcher.start_router(spec)
        self._tell(f"router-0 is up (pid {self._router.info.pid})")

    async def _start_worker(self, spec: WorkerSpec) -> None:
        self._tell(f"{spec.worker_id} ({spec.pool.role}) loads {spec.model.path}")
        state = "is starting"

        def loaded(done_bytes: int, total_bytes: int) -> None:
            nonlocal state
            state = f"has {done_bytes / total_bytes:.0%} of {total_bytes / 1e9:.1f} GB of weights"
            if done_bytes == total_bytes:
                state += " and makes its kernels ready"

        starting = asyncio.ensure_future(self._launcher.start_worker(spec, loaded))
        try:
            while not (await asyncio.wait([starting], timeout=STILL_LOADING_S))[0]:
                self._tell(f"{spec.worker_id} {state}")
        finally:
            starting.cancel()
        handle = await starting
        self._workers[spec.worker_id] = handle
        self._tell(f"{spec.worker_id} is up (pid {handle.info.pid})")

    async def supervise(self) -> None:
        """Restart workers that end or that the router lost. Runs until cancelled; raises
        Unavailable when the router ends, for then nothing is served."""
        with _first_baton_error():
            async with asyncio.TaskGroup() as group:
                for spec in worker_specs(self._config):
                    group.create_task(self._keep_alive(spec), name=f"keep {spec.worker_id}")
                group.create_task(self._stop_lost(), name="stop lost workers")
                group.create_task(self._watch_router(), name="watch router")

    async def _watch_router(self) -> None:
        assert self._router is not None
        reason = await self._router.wait()
        raise Unavailable(f"the router ended: {reason}; its log tells why", hop="router")

    async def _keep_alive(self, spec: WorkerSpec) -> None:
        assert self._router is not None
        backoff_s = FIRST_BACKOFF_S
        while True:
            handle = self._workers[spec.worker_id]
            started_at = asyncio.get_running_loop().time()
            reason = await handle.wait()
            self._tell(f"{spec.worker_id} ended ({reason}); starting it again")
            await self._router.worker_gone(spec.worker_id, handle.info.incarnation)
            if asyncio.get_running_loop().time() - started_at > MAX_BACKOFF_S:
                backoff_s = FIRST_BACKOFF_S
            while True:
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
                try:
                    await self._start_worker(spec)
                    break
                except BatonError as exc:
                    self._tell(f"{spec.worker_id} did not start: {exc}")
            await self._router.announce(self._workers[spec.worker_id].info)

    async def _stop_lost(self) -> None:
        """A worker that the router gave up may live on (stopped, cut off, wedged): end it, so
        that its next incarnation can take the place."""
        assert self._router is not None
        while True:
            await asyncio.sleep(WATCH_PERIOD_S)
            for worker_id, incarnation in (await self._router.status()).down:
                handle = self._workers.get(worker_id)
                if handle is not None and handle.info.incarnation == incarnation:
                    log.warning("%s is lost to the router; ending it", worker_id)
                    await handle.stop()

    async def stop(self, drain_s: float) -> None:
        """Let what runs finish for at most ``drain_s``, then end every process."""
        if self._router is not None:
            await self._router.stop(drain_s)
        await asyncio.gather(*(handle.stop() for handle in self._workers.values()))


@contextlib.contextmanager
def _first_baton_error() -> Iterator[None]:
    """Of a group of errors, the first that a user can act on; the group stays its cause."""
    try:
        yield
    except BaseExceptionGroup as errors:
        found, _ = errors.split(BatonError)
        if found is None:
            raise
        raise next(_leaves(found)) from errors


def _leaves(group: BaseExceptionGroup[BatonError]) -> Iterator[BatonError]:
    for exc in group.exceptions:
        if isinstance(exc, BaseExceptionGroup):
            yield from _leaves(exc)
        else:
            yield exc
