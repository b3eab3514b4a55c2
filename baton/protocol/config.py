"""The one YAML as structs. ``cluster.load`` turns a file into a ``ClusterConfig``.

The planner, the simulator and ``baton serve`` read the same tree. Everything is frozen;
derived values come from pure functions, never from editing one of these.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

PositiveInt = Annotated[int, Meta(ge=1)]
Port = Annotated[int, Meta(ge=0, le=65_535)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Meta(gt=0.0)]
Name = Annotated[str, Meta(pattern=r"^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$")]

Dtype = Literal["float32", "bfloat16", "float16"]
Role = Literal["prefill", "decode", "mixed"]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class ModelConfig(_Section, frozen=True):
    path: str
    """Folder of a Hugging Face checkpoint, or the name of a bundled one (baton-tiny)."""
    dtype: Dtype = "bfloat16"
    max_model_len: PositiveInt | None = None
    """Prompt plus output tokens; the checkpoint's own limit where absent."""
    served_name: str | None = None
    """The name clients say; the last part of ``path`` where absent."""
    deterministic: bool = False
    """A request gets the same tokens whatever runs beside it, however its prompt is cut, and
    wherever it is continued. Workers that compute in another way do not continue it."""


class Replicas(_Section, frozen=True):
    min: PositiveInt
    max: PositiveInt


class Placement(_Section, frozen=True):
    device: Literal["cpu", "cuda"] = "cpu"
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    cpus: PositiveFloat = 0.5
    """Ray CPUs that one worker reserves. Compute threads are ``engine.num_threads``."""
    resources: dict[str, PositiveFloat] = msgspec.field(default_factory=dict)
    """Further Ray resources that one worker reserves, to pin a pool to nodes."""


class EngineConfig(_Section, frozen=True):
    block_size: Annotated[int, Meta(ge=8, le=256)] = 16
    """Tokens per KV block."""
    num_blocks: PositiveInt = 512
    """KV blocks of one worker; num_blocks x block_size tokens fit."""
    max_num_seqs: PositiveInt = 64
    max_num_batched_tokens: PositiveInt = 512
    """Token budget of one step: prompts are cut into chunks that fit it."""
    num_threads: PositiveInt = 1
    """Compute threads of one worker. More threads than cores collapse beside each other."""
    growth_tokens: PositiveInt = 64
    """Decode room reserved beyond the prompt when a hand-over is granted."""
    watermark: Fraction = 0.02
    """Share of blocks that admission leaves free, so that running requests can grow."""
    prefix_cache: bool = True
    """Keep the KV of finished requests as long as its blocks are not needed, for prompts that
    begin alike."""
    swap_blocks: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    """KV blocks of host memory for preempted requests; they are swapped out or recomputed,
    whichever is predicted cheaper. 0: always recomputed."""
    speculation: Literal["off", "prompt_lookup"] = "off"
    """prompt_lookup: guess next tokens from earlier text and verify several in one step. The
    output is the same; what repeats itself comes faster while the batch is small."""
    prefill_mode: Literal["chunked", "layered"] = "chunked"
    """How a long prompt is kept from stalling decodes: cut into chunks of tokens, or all its
    tokens at once through a group of layers a step."""


class PoolConfig(_Section, frozen=True):
    name: Name
    role: Role
    replicas: PositiveInt | Replicas = 1
    tensor_parallel: Annotated[int, Meta(ge=1, le=64)] = 1
    """Processes over which each worker of the pool splits the model, with a GPU each or, on CPUs,
    ``engine.num_threads`` threads each. Divides the model's attention and KV heads and its MLP."""
    placement: Placement = Placement()
    engine: EngineConfig = EngineConfig()

    @property
    def num_replicas(self) -> int:
        return self.replicas if isinstance(self.replicas, int) else self.replicas.min


class KvTransferConfig(_Section, frozen=True):
    transport: Literal[
        "auto", "shared_memory", "zeromq", "zeromq_ipc", "gloo", "nccl", "cuda_ipc"
    ] = "auto"
    """How KV travels. "auto": shared memory between workers of one host, else ZeroMQ over TCP;
    ``baton status`` says which it took and why. ZeroMQ carries wherever another link was lost.
    gloo and nccl are torch.distributed's; nccl and cuda_ipc want GPUs at both ends."""
    codec: Literal[
        "auto", "raw", "split", "entropy", "int8", "fp8", "int4", "kv1", "kv2", "kv3", "kv4"
    ] = "auto"
    """"auto": each chunk by what is predicted to be over soonest. Another: always that one, where
    the request's floor allows it, else raw."""
    quality_floor: Literal["exact", "lossless", "high", "medium", "low"] = "lossless"
    """Of requests that name none: "exact" is the bits that prefill computed, "lossless" those or
    computed again from the tokens; below that lossy codecs may be used, as good as that."""
    max_frame_bytes: Annotated[int, Meta(ge=4_096, le=64 * 2**20)] = 1 * 2**20
    lease_s: PositiveFloat = 10.0
    """A decode reservation dies when its prefill side was silent for so long."""
    max_resends: Annotated[int, Meta(ge=0, le=16)] = 2


class SloConfig(_Section, frozen=True):
    ttft_ms: PositiveFloat = 1_000.0
    tpot_ms: PositiveFloat = 100.0


class MigrationConfig(_Section, frozen=True):
    enabled: Literal[False] = False
    """Live migration comes with a later release: false only."""


class RouterConfig(_Section, frozen=True):
    host: str = "127.0.0.1"
    grpc_port: Port = 50_051
    """0 takes a free port; ``baton status`` and the start-up message name it."""
    http_port: Port = 8_000
    slo: SloConfig = SloConfig()
    placement: Literal["least_loaded", "round_robin"] = "least_loaded"
    max_queued_requests: Annotated[int, Meta(ge=1, le=65_536)] = 1_024
    """Requests in the cluster beyond which new ones are shed (429)."""
    default_timeout_s: PositiveFloat = 600.0
    max_timeout_s: PositiveFloat = 3_600.0
    max_attempts: Annotated[int, Meta(ge=1, le=10)] = 3
    worker_lease_s: PositiveFloat = 5.0
    """A worker that has not reported for so long counts as lost."""
    drain_timeout_s: PositiveFloat = 30.0
    migration: MigrationConfig = MigrationConfig()


class NetworkConfig(_Section, frozen=True):
    worker_host: str = "127.0.0.1"
    """Where workers listen for routers and each other. "node" is each Ray node's own address:
    use it on a network that you trust, for messages and KV are not encrypted yet."""


class ClusterConfig(_Section, frozen=True):
    version: Literal[1]
    model: ModelConfig
    pools: Annotated[tuple[PoolConfig, ...], Meta(min_length=1, max_length=64)]
    kv_transfer: KvTransferConfig = KvTransferConfig()
    router: RouterConfig = RouterConfig()
    network: NetworkConfig = NetworkConfig()
    links: Annotated[tuple[str, ...], Meta(max_length=0)] = ()
    """Measured or promised bandwidths come with the planner: an empty list only."""
