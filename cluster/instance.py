"""A worker or router as a running thing: assembled, bound, served, stopped.

Used alike by Ray actors and by bare processes: neither knows more than ``start``, ``wait``
and ``stop``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Protocol

from baton.checkpoint.find import resolve
from baton.engine.executor import Executor
from baton.protocol.clock import MonotonicClock
from baton.protocol.errors import RankLost
from baton.protocol.ids import new_incarnation
from baton.protocol.spec import WorkerInfo, WorkerSpec
from baton.worker.rank_watch import watch_ranks
from decode_worker.service import DecodeService
from prefill_worker.service import PrefillService

Progress = Callable[[int, int], None]
"""(bytes loaded, bytes in all), called from the thread that loads."""


class Service(Protocol):
    def bind(self) -> str: ...

    async def run(self) -> None: ...


class WorkerInstance:
    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._task: asyncio.Task[None] | None = None

    async def start(self, progress: Progress | None = None) -> WorkerInfo:
        """Load the model, bind, and serve in the background. Raises ConfigError."""
        executor = await asyncio.to_thread(load_executor, self._spec, progress)
        incarnation = new_incarnation()
        try:
            service = build(self._spec, incarnation, executor)
            address = service.bind()
        except BaseException:
            executor.close()
            raise
        self._task = asyncio.get_running_loop().create_task(serve(service, executor), name="worker")
        return WorkerInfo(
            worker_id=self._spec.worker_id,
            incarnation=incarnation,
            role=self._spec.pool.role,
            address=address,
            pid=os.getpid(),
        )

    async def wait(self) -> None:
        """Until the service has ended; raises what it raised."""
        assert self._task is not None, "start comes first"
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.result()

    async def stop(self) -> None:
        """Idempotent. A step in flight is finished, nothing else is waited for."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])


async def serve(service: Service, executor: Executor) -> None:
    """Until cancelled. Raises RankLost when a rank of this worker is gone; none is left then."""
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(service.run(), name="service")
            group.create_task(watch_ranks(executor), name="ranks")
    except BaseExceptionGroup as failures:
        losses = failures.subgroup(RankLost)
        if losses is None:
            raise
        raise _first(losses) from failures
    finally:
        executor.close()


def _first(errors: BaseExceptionGroup[RankLost]) -> RankLost:
    """The step and the watch notice the same loss."""
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def load_executor(spec: WorkerSpec, progress: Progress | None) -> Executor:
    engine = spec.pool.engine
    return Executor.load(
        resolve(spec.model.path),
        dtype=spec.model.dtype,
        device=spec.pool.placement.device,
        num_blocks=engine.num_blocks,
        block_size=engine.block_size,
        num_threads=engine.num_threads,
        swap_blocks=engine.swap_blocks,
        deterministic=spec.model.deterministic,
        max_model_len=spec.model.max_model_len,
        tensor_parallel=spec.pool.tensor_parallel,
        progress=progress,
    )


def build(spec: WorkerSpec, incarnation: str, executor: Executor) -> Service:
    """A mixed instance is a decode worker that the router gives whole requests."""
    clock = MonotonicClock()
    if spec.pool.role == "prefill":
        return PrefillService(spec, incarnation, executor, clock)
    return DecodeService(spec, incarnation, executor, clock)
