"""What rank 0 says to the other ranks, and their answers. Nothing else crosses but tensors.

Two channels a rank, so that KV is read and written beside a step: *steps* carries the settings
and then plans, answered while starting only; *kv* carries requests, each answered before the next.
"""

from __future__ import annotations

from inspect import signature
from types import GenericAlias
from typing import Any, get_type_hints

import msgspec

from baton.engine.parallel.shard import Shard
from baton.engine.plan import SequenceChunk, StepPlan
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
    max_model_len: int | None = None
    deterministic: bool = False
    swap_blocks: int = 0
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


_FOR_SAMPLING = ("sampling", "prompt_ids", "output_ids")
"""What of a chunk stays on rank 0; whatever else a chunk ever has goes to the ranks."""
_CHUNK_FIELDS = tuple(n for n in signature(SequenceChunk).parameters if n not in _FOR_SAMPLING)
_PLAN_FIELDS = tuple(n for n in signature(StepPlan).parameters if n != "chunks")


def _positional(name: str, hints: dict[str, Any]) -> Any:
    return msgspec.defstruct(name, list(hints.items()), frozen=True, array_like=True)


def _hints(kind: type, names: tuple[str, ...]) -> dict[str, Any]:
    found = get_type_hints(kind)
    return {name: found[name] for name in names}


_ChunkForRanks = _positional("ChunkForRanks", _hints(SequenceChunk, _CHUNK_FIELDS))
_Chunks = GenericAlias(tuple, (_ChunkForRanks, ...))
PlanForRanks = _positional("PlanForRanks", _hints(StepPlan, _PLAN_FIELDS) | {"chunks": _Chunks})


def encode_plan(plan: StepPlan) -> bytes:
    return msgspec.msgpack.encode(msgspec.convert(plan, PlanForRanks, from_attributes=True))


def plan_of(told: Any) -> StepPlan:
    """told: a ``PlanForRanks`` that has arrived. Its sampling parameters mean nothing."""
    chunks = (
        SequenceChunk(sampling=_ANY_SAMPLING, **{n: getattr(c, n) for n in _CHUNK_FIELDS})
        for c in told.chunks
    )
    return StepPlan(chunks=tuple(chunks), **{n: getattr(told, n) for n in _PLAN_FIELDS})
