"""Coding KV beside the event loop: one thread, and the codecs of one layout by name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from baton.checkpoint.find import resolve
from baton.protocol.layout import KvGroup, KvLayout
from kv_transfer.codec_warm_up import CodecWarmUp
from kv_transfer.codecs import registry
from kv_transfer.codecs.contract import Array, Bytes, Codec, KvPart, Quality, array_dtype
from kv_transfer.codecs.lossy_profile import Profile, find_profile
from kv_transfer.frames import RAW, FrameCut

AUTO = "auto"
TRIED_TOKENS = 80
"""More than a group of tokens (``codecs.int_groups``): of fewer, quantisers send the raw bytes."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Geometry:
    dtype: str
    num_kv_heads: int
    head_dim: int


class KvCoding:
    """profile: of the model, for the codecs that need one. ``close`` when no more work is given."""

    def __init__(self, layout: KvLayout, profile: Profile | None = None) -> None:
        self._layout = layout
        self._profile = profile
        self._made: dict[tuple[str, _Geometry], Codec] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv codec")
        self._warm_up = CodecWarmUp(self.try_out)

    @classmethod
    def of_model(cls, path_or_name: str, layout: KvLayout) -> KvCoding:
        """Raises ConfigError for a profile that was made from other weights."""
        return cls(layout, find_profile(resolve(path_or_name), layout.model_digest))

    def names(self, wanted: str) -> tuple[str, ...]:
        """wanted: a codec's name, or "auto" for all that were measured on this model."""
        if wanted == AUTO:
            lossy = () if self._profile is None else registry.LOSSY
            return (*registry.WITHOUT_PROFILE, *lossy)
        return tuple(dict.fromkeys((RAW, wanted)))

    def decodable(self, wanted: str) -> tuple[str, ...]:
        """At the other end of one who sends ``names(wanted)``, or anything else."""
        return tuple(dict.fromkeys((*self.names(AUTO), *self.names(wanted))))

    def labels(self, names: Iterable[str]) -> Mapping[str, str]:
        """What both ends must have in common to use a codec of that name."""
        digest = "plain" if self._profile is None else self._profile.digest().hex()
        return {name: f"{name}@{digest}" if name in registry.LOSSY else name for name in names}

    def qualities(self, names: tuple[str, ...]) -> Mapping[str, Quality]:
        """Of each of the codecs named, ``raw`` first."""
        geometry = _geometry(self._layout, self._layout.groups[0])
        others = {name: self._codec(name, geometry).quality for name in names if name != RAW}
        return {RAW: Quality.EXACT} | others

    def prepare(self, names: Iterable[str]) -> None:
        """Begin to make them ready, beside all else; the first call counts."""
        self._warm_up.begin(name for name in names if name != RAW)

    def wait_until_prepared(self) -> None:
        self._warm_up.wait()

    def is_ready(self, name: str) -> bool:
        """Using another works too, but may take as long as compiling it."""
        return name == RAW or self._warm_up.is_ready(name)

    def try_out(self, name: str) -> None:
        """Code and decode a little noise."""
        group = self._layout.groups[0]
        cut = FrameCut(group.layers[0], 1, 0, TRIED_TOKENS)
        noise = np.random.default_rng(0).standard_normal(self._shape(cut), np.float32)
        if self._layout.dtype == "float16":
            noise = noise.astype(np.float16)
        kv = noise.view(np.uint8)
        if self._layout.dtype == "bfloat16":
            kv = (noise.view(np.uint32) >> np.uint32(16)).astype(np.uint16).view(np.uint8)
        stream = self.encode(name, kv.reshape(-1).data, cut, TRIED_TOKENS)
        self.decode(name, stream, cut, TRIED_TOKENS)

    async def run(self, work: Callable[[], T]) -> T:
        """``work`` in the thread, in the order of the calls. Cancelled, it still waits for its
        end: the memory that ``work`` uses may be the caller's."""
        future = asyncio.get_running_loop().run_in_executor(self._thread, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            while not future.done():
                try:
                    await asyncio.wait([future])
                except asyncio.CancelledError:
                    continue
            future.exception()
            raise

    def encode(self, name: str, kv: memoryview, cut: FrameCut, num_tokens_total: int) -> memoryview:
        """In the thread. kv: the rectangle's own bytes."""
        shape, codec = self._shape(cut), self._codec_of(name, cut)
        array = np.frombuffer(kv, dtype=array_dtype(self._layout.dtype)).reshape(shape)
        return memoryview(codec.encode(array, _part(cut, num_tokens_total))).cast("B")

    def decode(self, name: str, stream: Bytes, cut: FrameCut, num_tokens_total: int) -> memoryview:
        """In the thread. The rectangle's own bytes; raises CodecError."""
        out: Array = np.empty(self._shape(cut), dtype=array_dtype(self._layout.dtype))
        self._codec_of(name, cut).decode(stream, _part(cut, num_tokens_total), out)
        return out.reshape(-1).view(np.uint8).data

    def close(self) -> None:
        self._warm_up.close()
        self._thread.shutdown(wait=True)

    def _shape(self, cut: FrameCut) -> tuple[int, ...]:
        group = self._layout.groups[cut.group]
        return (cut.num_layers, 2, cut.num_tokens, group.num_kv_heads, group.head_dim)

    def _codec_of(self, name: str, cut: FrameCut) -> Codec:
        return self._codec(name, _geometry(self._layout, self._layout.groups[cut.group]))

    def _codec(self, name: str, geometry: _Geometry) -> Codec:
        codec = self._made.get((name, geometry))
        if codec is None:
            codec = self._made[name, geometry] = registry.make(
                name, geometry, profile=self._profile
            )
        return codec


def _geometry(layout: KvLayout, group: KvGroup) -> _Geometry:
    return _Geometry(layout.dtype, group.num_kv_heads, group.head_dim)


def _part(cut: FrameCut, num_tokens_total: int) -> KvPart:
    return KvPart(cut.layer_start, cut.token_start, num_tokens_total)
