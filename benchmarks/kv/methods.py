"""Everything whose quality and size are compared, as functions from KV to what arrives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.kv import cachegen
from kv_transfer.codecs import registry
from kv_transfer.codecs.contract import Array, Codec, KvGeometry, KvPart
from kv_transfer.codecs.lossy import LossyCodec
from kv_transfer.codecs.lossy_profile import Profile

PUBLISHED_SCALES = (0.25, 0.4, 0.6, 0.9)
SHIPPED_LEVELS = (3, 2, 1)
SHIPPED_CHUNK = 256
SIMPLE = ("entropy", "int8", "fp8", "int4")


@dataclass(frozen=True, slots=True)
class Arrived:
    """kv: the array as the decode side gets it. bits: on the wire, for all of it."""

    kv: Array
    bits: float
    bits_without_tables: float


@dataclass(frozen=True, slots=True)
class Method:
    """family: what is drawn as one front."""

    name: str
    family: str
    run: Callable[[Array, KvPart], Arrived]


def methods(geometry: KvGeometry, num_layers: int, profile: Profile) -> list[Method]:
    """geometry: of bfloat16 caches."""
    found = [
        Method("raw", "simple", lambda kv, part: Arrived(kv, 8.0 * kv.nbytes, 8.0 * kv.nbytes))
    ]
    found += [Method(n, "simple", _codec(registry.make(n, geometry))) for n in SIMPLE]
    found += [
        Method(level.name, "kv", _codec(LossyCodec(geometry, profile, level.name)))
        for level in profile.levels
    ]
    found += [
        Method(f"published x{scale:g}", "published", _published(scale))
        for scale in PUBLISHED_SCALES
    ]
    found += [
        Method(
            f"shipped {level}",
            "shipped",
            _shipped(cachegen.shipped_bins(num_layers, level)),
        )
        for level in SHIPPED_LEVELS
    ]
    return found


def _codec(codec: Codec) -> Callable[[Array, KvPart], Arrived]:
    def run(kv: Array, part: KvPart) -> Arrived:
        stream = codec.encode(kv, part)
        out = np.empty_like(kv)
        codec.decode(stream, part, out)
        return Arrived(out, 8.0 * len(stream), 8.0 * len(stream))

    return run


def _published(scale: float) -> Callable[[Array, KvPart], Arrived]:
    return lambda kv, part: _arrived(cachegen.as_published(_wide(kv), scale), kv)


def _shipped(bins: tuple[tuple[int, ...], tuple[int, ...]]) -> Callable[[Array, KvPart], Arrived]:
    return lambda kv, part: _arrived(cachegen.as_shipped(_wide(kv), bins, SHIPPED_CHUNK), kv)


def _arrived(coded: cachegen.Coded, like: Array) -> Arrived:
    bits = np.ascontiguousarray(coded.kv).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    kv = rounded.astype(np.uint16).reshape(like.shape)
    return Arrived(kv, coded.bits, coded.bits_without_tables)


def _wide(kv: Array) -> NDArray[np.float32]:
    flat = kv.reshape(*kv.shape[:3], -1)
    return (flat.astype(np.uint32) << np.uint32(16)).view(np.float32)
