"""Workers and routers as Ray actors, placed by one placement group per pool.

Either a local Ray of our own (started and ended with this launcher), or a cluster that
``ray up`` brought up, joined by its address.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import msgspec
import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from baton.protocol.config import ClusterConfig, PoolConfig
from baton.protocol.errors import BatonError, InternalError, Unavailable
from baton.protocol.spec import RouterInfo, RouterSpec, RouterStatus, WorkerInfo, WorkerSpec
from cluster.actors import RouterActor, WorkerActor
from cluster.launcher import Loaded

STOP_TIMEOUT_S = 5.0
PLACEMENT_TIMEOUT_S = 60
ASK_LOADED_S = 1.0
ROUTER_CPUS = 0.1


def bundle(pool: PoolConfig) -> dict[str, float]:
    """What one replica of a pool reserves of a Ray node."""
    gpus = {"GPU": float(pool.tensor_parallel)} if pool.placement.device == "cuda" else {}
    return {"CPU": pool.placement.cpus, **gpus, **pool.placement.resources}


class RayWorker:
    def __init__(self, actor: Any, info: WorkerInfo) -> None:
        self._actor = actor
        self.info = info

    async def wait(self) -> str:
        return await _until_dead(self._actor)

    async def stop(self) -> None:
        await _stop(self._actor)


class RayRouter:
    def __init__(self, actor: Any, info: RouterInfo) -> None:
        self._actor = actor
        self.info = info

    async def announce(self, info: WorkerInfo) -> None:
        await self._actor.announce.remote(msgspec.json.encode(info))

    async def worker_gone(self, worker_id: str, incarnation: str) -> None:
        await self._actor.worker_gone.remote(worker_id, incarnation)

    async def status(self) -> RouterStatus:
        return msgspec.json.decode(await self._actor.status.remote(), type=RouterStatus)

    async def wait(self) -> str:
        return await _until_dead(self._actor)

    async def stop(self, drain_s: float) -> None:
        await _stop(self._actor, drain_s)


class RayLauncher:
    """address: None starts a Ray of our own on this machine, "auto" joins the one here."""

    def __init__(self, config: ClusterConfig, address: str | None = None) -> None:
        self._config = config
        self._address = address
        self._groups: dict[str, PlacementGroup] = {}
        self._next_bundle: dict[str, int] = {}
        self._bundle_of: dict[str, int] = {}
        self._actors: list[Any] = []

    async def __aenter__(self) -> RayLauncher:
        joining = asyncio.ensure_future(asyncio.to_thread(self._join))
        try:
            # Ray cannot be stopped half started: an interrupt waits these seconds.
            await asyncio.shield(joining)
            for pool in self._config.pools:
                await self._reserve(pool)
        except BaseException:
            await asyncio.wait([joining])
            await self.__aexit__()
            raise
        return self

    def _join(self) -> None:
        try:
            if self._address is None:
                cpus = sum(p.num_replicas * p.placement.cpus for p in self._config.pools)
                ray.init(
                    address="local",
                    num_cpus=int(cpus + ROUTER_CPUS) + 1,
                    include_dashboard=False,
                    configure_logging=True,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                )
            else:
                ray.init(address=self._address, logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as exc:
            where = self._address or "on this machine"
            raise Unavailable(f"cannot start or join Ray ({where}): {exc}", hop="ray") from exc

    async def _reserve(self, pool: PoolConfig) -> None:
        bundles = [bundle(pool)] * pool.num_replicas
        group = placement_group(bundles, strategy=pool.placement.strategy, name="")
        self._groups[pool.name] = group
        for _ in range(PLACEMENT_TIMEOUT_S):
            if await asyncio.to_thread(group.wait, 1):
                break
        else:
            raise Unavailable(
                f"Ray found no room for pool {pool.name!r}: {pool.num_replicas} x "
                f"{bundles[0]} ({pool.placement.strategy}) within {PLACEMENT_TIMEOUT_S} s; "
                f"the cluster has {_cluster_resources()}",
                hop="ray",
            )

    async def __aexit__(self, *exc: object) -> None:
        try:
            for actor in self._actors:
                await _stop(actor)
            for group in self._groups.values():
                remove_placement_group(group)
        finally:
            # On this thread: Ray's own hook for uncaught errors waits a minute for a head
            # that is gone when the shutdown was left out.
            ray.shutdown()

    async def start_worker(self, spec: WorkerSpec, loaded: Loaded) -> RayWorker:
        pool = spec.pool
        index = self._bundle_of.get(spec.worker_id)
        if index is None:
            index = self._bundle_of[spec.worker_id] = self._next_bundle.get(pool.name, 0)
            self._next_bundle[pool.name] = index + 1
        reserved = bundle(pool)
        actor = (
            _remote(WorkerActor)
            .options(
                max_concurrency=16,
                num_cpus=reserved.pop("CPU"),
                num_gpus=reserved.pop("GPU", 0.0),
                resources=reserved,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._groups[pool.name], placement_group_bundle_index=index
                ),
            )
            .remote(msgspec.json.encode(spec))
        )
        info = await self._started(actor, spec.worker_id, loaded)
        return RayWorker(actor, msgspec.json.decode(info, type=WorkerInfo))

    async def start_router(self, spec: RouterSpec) -> RayRouter:
        # Its ports are on the loopback interface of the machine on which they were asked for.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = (
            _remote(RouterActor)
            .options(num_cpus=ROUTER_CPUS, max_concurrency=64, scheduling_strategy=here)
            .remote(msgspec.json.encode(spec))
        )
        info = await self._started(actor, spec.router_id)
        return RayRouter(actor, msgspec.json.decode(info, type=RouterInfo))

    async def _started(self, actor: Any, name: str, loaded: Loaded | None = None) -> bytes:
        self._actors.append(actor)
        starting = asyncio.ensure_future(_answered(actor.start.remote()))
        try:
            while loaded is not None:
                if (await asyncio.wait([starting], timeout=ASK_LOADED_S))[0]:
                    break
                if (found := await actor.loaded.remote()) is not None:
                    loaded(*found)
            info: bytes = await starting
        except RayTaskError as exc:
            if isinstance(exc.cause, BatonError):
                raise exc.cause from exc
            raise InternalError(f"{name} did not start: {exc}", hop=name) from exc
        except RayActorError as exc:
            raise Unavailable(f"{name} died while it started: {exc}", hop=name) from exc
        finally:
            starting.cancel()
        return info


async def _answered(reference: Any) -> bytes:
    """Ray's references can be awaited, but are no coroutines that a task could be made of."""
    answer: bytes = await reference
    return answer


def _cluster_resources() -> dict[str, float]:
    return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]


def _remote(cls: type) -> Any:
    """Ray's own types do not know the options of actors."""
    return ray.remote(cls)


async def _until_dead(actor: Any) -> str:
    try:
        await actor.wait.remote()
    except RayActorError:
        return "its process died"
    except RayTaskError as exc:
        return f"it raised {exc}"
    return "it was stopped"


async def _stop(actor: Any, *args: float) -> None:
    with contextlib.suppress(RayActorError, RayTaskError, TimeoutError):
        async with asyncio.timeout(sum(args) + STOP_TIMEOUT_S):
            await actor.stop.remote(*args)
    ray.kill(actor)
