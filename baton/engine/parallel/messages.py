"""What rank 0 says to the other ranks, and their answers. Nothing else crosses but tensors.

Two channels a rank, so that KV is read and written beside a step: *steps* carries the settings
and then plans, answered while starting only; *kv* carries requests, each answered before the next.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec

from baton.engine.parallel.shard import Shard
from baton.engine.plan import StepPlan
from baton.protocol.sampling import SamplingParams

_ANY_SAMPLING = SamplingParams()


class LoadSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What ``Executor.load`` was asked for, and which part of it a rank is. folder: resolved."""

    folder: str
    dtype: str
    device: str
    num_blocks: int
    block_size: int
    num_threads: int
    deterministic: bool = False
    rank: int = 0
    num_ranks: int = 1

    @property
    def shard(self) -> Shard:
        return Shard(self.rank, self.num_ranks)


class Join(msgspec.Struct, frozen=True, kw_only=True):
    """The first message to a rank."""

    settings: LoadSettings
    store_port: int
    deadline_s: float


class Started(msgspec.Struct, frozen=True, tag=True):
    """The rank's process is up and can run what it was told; it joins the others next."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Loaded: the rank waits for plans."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The rank could not start: a BatonError's code and message."""

    code: str
    message: str


class KvRange(msgspec.Struct, frozen=True):
    """The arguments of ``KvCache.read``; to be done when ``num_steps`` steps are."""

    num_steps: int
    block_table: tuple[int, ...]
    start: int
    num_tokens: int
    layer_start: int
    num_layers: int


class ReadKv(msgspec.Struct, frozen=True, tag=True):
    range: KvRange


class WriteKv(msgspec.Struct, frozen=True, tag=True):
    range: KvRange
    payload: memoryview


class KvDone(msgspec.Struct, frozen=True, tag=True):
    """payload: of a read; empty after a write."""

    payload: memoryview


Start = Started | Ready | Failed
KvRequest = ReadKv | WriteKv


def encode_plan(plan: StepPlan) -> bytes:
    """For the ranks that do not sample: without what only sampling looks at."""
    chunks = tuple(
        replace(c, sampling=_ANY_SAMPLING, prompt_ids=(), output_ids=()) for c in plan.chunks
    )
    return msgspec.msgpack.encode(replace(plan, chunks=chunks))
