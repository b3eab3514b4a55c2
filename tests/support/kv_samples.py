"""KV to code: arrays that look like a model's, and arrays that no model makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_transfer.codecs.container import Form, StreamHeader, StreamWriter
from kv_transfer.codecs.contract import KvPart

PART = KvPart(layer_start=0, token_start=0, num_tokens_total=4096)
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Geometry:
    dtype: str
    num_kv_heads: int
    head_dim: int


def kv_like(geometry: Geometry, num_layers: int, num_tokens: int, seed: int = 0) -> NDArray[Any]:
    """Normal values; channels differ in size and offset, as a model's do."""
    rng = np.random.default_rng(seed)
    shape = (num_layers, 2, num_tokens, geometry.num_kv_heads, geometry.head_dim)
    per_channel = (num_layers, 2, 1, *shape[3:])
    size = np.exp(rng.normal(size=per_channel))
    values = (rng.normal(size=shape) + rng.normal(size=per_channel)) * size
    return as_dtype(values.astype(np.float32), geometry.dtype)


def as_dtype(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """As codecs take them (``contract.ARRAY_DTYPES``); bfloat16 is cut, not rounded."""
    if dtype == "float32":
        return values.astype(np.float32)
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def random_bits(geometry: Geometry, num_layers: int, num_tokens: int, seed: int) -> NDArray[Any]:
    """Every bit pattern is as likely: NaN of all kinds, infinities, subnormals."""
    rng = np.random.default_rng(seed)
    shape = (num_layers, 2, num_tokens, geometry.num_kv_heads, geometry.head_dim)
    if geometry.dtype == "float32":
        return rng.integers(0, 1 << 32, shape, np.uint32).view(np.float32)
    return rng.integers(0, 1 << 16, shape, np.uint16)


def bits(kv: NDArray[Any]) -> bytes:
    return kv.tobytes()


def sealed(header: StreamHeader, sections: list[bytes], form: Form = Form.CODED) -> bytes:
    """A stream whose checksums are right, whatever its sections hold."""
    writer = StreamWriter(header)
    for data in sections:
        writer.room()[: len(data)] = np.frombuffer(data, np.uint8)
        writer.commit(len(data), form)
    return bytes(writer.finish())
