"""What ``fp8`` is built from, compiled for one CPU core."""

from __future__ import annotations

from typing import Any

import numpy as np

from kv_transfer.codecs.contract import Array
from kv_transfer.codecs.float_forms import U8
from kv_transfer.codecs.float_values import F32, bits_of_float, float_of, widen
from kv_transfer.codecs.jit import kernel

__all__ = ["look_up", "to_e4m3", "widen"]

S, W = np.float32, np.uint32


def to_e4m3(x: F32, scale: np.float32, codes: U8) -> None:
    """As ``fp8_reference.to_e4m3``."""
    assert x.shape == codes.shape
    _to_e4m3(x, scale, codes)


def look_up(codes: U8, table: Array, out: Array) -> None:
    """As ``fp8_reference.look_up``."""
    assert table.shape == (256,)
    assert codes.shape == out.shape
    _look_up(codes, table, out)


@kernel
def _to_e4m3(x: Any, scale: Any, codes: Any) -> None:
    for i in range(x.size):
        bits = bits_of_float(x[i] * scale)
        size = bits & W(0x7FFFFFFF)
        normal = (size + ((size >> W(20)) & W(1)) + W(0x7FFFF) - W(120 << 23)) >> W(20)
        small = bits_of_float(float_of(size) + S(2.0**14)) - W((127 + 14) << 23)
        code = small if size < W(121 << 23) else normal
        codes[i] = np.uint8(code | (bits >> W(24)) & W(0x80))


@kernel
def _look_up(codes: Any, table: Any, out: Any) -> None:
    for i in range(codes.size):
        out[i] = table[codes[i]]
