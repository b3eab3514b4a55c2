"""What it takes to start one process of a cluster, as data that a launcher passes on."""

from __future__ import annotations

import msgspec

from baton.protocol.config import KvTransferConfig, ModelConfig, PoolConfig, RouterConfig


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """host: the address that this worker binds and that its peers connect to."""

    worker_id: str
    pool: PoolConfig
    model: ModelConfig
    kv_transfer: KvTransferConfig
    host: str = "127.0.0.1"


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a started worker publishes: with it, peers need no registry any more."""

    worker_id: str
    incarnation: str
    role: str
    address: str
    pid: int


class RouterSpec(msgspec.Struct, frozen=True, kw_only=True):
    router_id: str
    model: ModelConfig
    config: RouterConfig
    kv_quality: str = ""
    """The floor of requests that name none."""


class RouterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """not_ready: "" when requests can be placed. down: (worker id, incarnation) given up."""

    not_ready: str
    down: tuple[tuple[str, str], ...] = ()


class RouterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Addresses are ``host:port``, with the ports that were really bound."""

    router_id: str
    grpc_address: str
    http_address: str
    pid: int
