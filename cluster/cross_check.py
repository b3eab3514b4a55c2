"""What no single field can say: rules between fields, and the checkpoint that must exist.

Works on the parts that passed the schema walk, so that a misspelt key in one pool does not
hide a duplicate name of two others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import msgspec

from baton.checkpoint.find import resolve
from baton.checkpoint.spec import ModelSpec, load_spec
from baton.engine.parallel.shard import allowed_sizes, refusals
from baton.protocol.config import (
    KvTransferConfig,
    ModelConfig,
    NetworkConfig,
    PoolConfig,
    Replicas,
    RouterConfig,
)
from baton.protocol.errors import ConfigError

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
NODE_HOST = "node"
LOSSLESS_CODECS = ("auto", "raw", "split", "entropy")

Found = tuple[str, str]
"""(path, message) of one problem."""

T = TypeVar("T")


def check_sections(data: Mapping[str, Any]) -> Iterator[Found]:
    """``data``: what the walk kept, plain values; missing and bad parts are absent from it."""
    raw_pools = data.get("pools")
    pools = _pools(raw_pools if isinstance(raw_pools, list) else [])
    yield from _check_names(pools)
    if isinstance(raw_pools, list) and len(pools) == len(raw_pools):
        yield from _check_roles(pools)
    for path, pool in pools.items():
        if isinstance(pool.replicas, Replicas) and pool.replicas.min > pool.replicas.max:
            yield (
                f"{path}.replicas",
                f"min {pool.replicas.min} is above max {pool.replicas.max}; swap or raise one",
            )
    model = _convert(data.get("model"), ModelConfig)
    if model is not None:
        yield from _check_model(model, pools)
        if model.deterministic:
            yield from _check_alike(pools)
    transfer = _convert(data.get("kv_transfer", {}), KvTransferConfig)
    if transfer is not None:
        yield from _check_codec(transfer)
    router = _convert(data.get("router", {}), RouterConfig)
    if router is not None:
        yield from _check_router(router)
    network = _convert(data.get("network", {}), NetworkConfig)
    if network is not None:
        yield from _check_network(network)


def _pools(raw_pools: list[Any]) -> dict[str, PoolConfig]:
    """Path to pool, for the pools whose every field is right."""
    converted = ((f"pools[{i}]", _convert(raw, PoolConfig)) for i, raw in enumerate(raw_pools))
    return {path: pool for path, pool in converted if pool is not None}


def _convert(raw: Any, kind: type[T]) -> T | None:
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError:
        return None


def _check_names(pools: Mapping[str, PoolConfig]) -> Iterator[Found]:
    first: dict[str, str] = {}
    for path, pool in pools.items():
        if pool.name in first:
            yield f"{path}.name", f"{pool.name!r} is already the name of {first[pool.name]}"
        first.setdefault(pool.name, path)


def _check_roles(pools: Mapping[str, PoolConfig]) -> Iterator[Found]:
    roles = {pool.role for pool in pools.values()}
    if "mixed" in roles:
        return
    for role, work in (("prefill", "compute prompts"), ("decode", "write answers")):
        if role not in roles:
            yield (
                "pools",
                f"no pool can {work}: add one with role {role}, or one with role mixed",
            )


def _check_model(model: ModelConfig, pools: Mapping[str, PoolConfig]) -> Iterator[Found]:
    limit = None
    try:
        spec = load_spec(resolve(model.path), model.max_model_len)
        limit = spec.max_position_embeddings
        yield from _check_split(spec, pools)
    except ConfigError as exc:
        yield "model.path", exc.message
    length = model.max_model_len if model.max_model_len is not None else limit
    if limit is not None and length is not None and length > limit:
        yield "model.max_model_len", f"is {length}; the checkpoint was made for at most {limit}"
        length = limit
    if length is None:
        return
    for path, pool in pools.items():
        room = pool.engine.num_blocks * pool.engine.block_size
        if room < length:
            need = -(-length // pool.engine.block_size)
            yield (
                f"{path}.engine.num_blocks",
                f"{pool.engine.num_blocks} blocks of {pool.engine.block_size} tokens hold {room} "
                f"tokens, less than one request of {length}; give at least {need} blocks, or "
                "lower model.max_model_len",
            )


def _check_split(spec: ModelSpec, pools: Mapping[str, PoolConfig]) -> Iterator[Found]:
    for path, pool in pools.items():
        refused = refusals(spec, pool.tensor_parallel)
        if refused:
            allowed = ", ".join(map(str, allowed_sizes(spec)))
            yield (
                f"{path}.tensor_parallel",
                f"is {pool.tensor_parallel}; {'; '.join(refused)}; allowed here: {allowed}",
            )


def _check_alike(pools: Mapping[str, PoolConfig]) -> Iterator[Found]:
    """Deterministic mode: what one pool began another must be able to continue to the bit."""
    first: PoolConfig | None = None
    for path, pool in pools.items():
        first = first or pool
        for field, own, other in (
            ("placement.device", pool.placement.device, first.placement.device),
            ("tensor_parallel", pool.tensor_parallel, first.tensor_parallel),
        ):
            if own != other:
                yield (
                    f"{path}.{field}",
                    f"is {own} and {other} in pool {first.name}, which adds up in another order; "
                    "make them equal, or set model.deterministic to false",
                )


def _check_codec(transfer: KvTransferConfig) -> Iterator[Found]:
    lossy = transfer.codec not in LOSSLESS_CODECS
    if lossy and transfer.quality_floor in ("exact", "lossless"):
        yield (
            "kv_transfer.codec",
            f"is {transfer.codec}, which changes KV, and quality_floor is "
            f"{transfer.quality_floor}: nothing could go through it; lower quality_floor, or take "
            f"one of {', '.join(LOSSLESS_CODECS)}",
        )


def _check_network(network: NetworkConfig) -> Iterator[Found]:
    if network.worker_host not in (*LOOPBACK_HOSTS, NODE_HOST):
        yield (
            "network.worker_host",
            f"is {network.worker_host!r}; allowed: {', '.join(LOOPBACK_HOSTS)}, or {NODE_HOST} for "
            "each Ray node's own address, on a network that you trust",
        )


def _check_router(router: RouterConfig) -> Iterator[Found]:
    if router.host not in LOOPBACK_HOSTS:
        yield (
            "router.host",
            f"is {router.host!r}; allowed: {', '.join(LOOPBACK_HOSTS)}. This release has neither "
            "TLS nor API keys, so it serves this machine only: put a proxy that has both in front",
        )
    if router.grpc_port and router.grpc_port == router.http_port:
        yield (
            "router.http_port",
            f"is {router.http_port}, which grpc_port has already; give each its own (0 takes a "
            "free one)",
        )
    if router.default_timeout_s > router.max_timeout_s:
        yield (
            "router.default_timeout_s",
            f"is {router.default_timeout_s:g}, above max_timeout_s ({router.max_timeout_s:g})",
        )
