"""e4m3 (sign, 4 exponent bits, 3 of mantissa; no infinity, NaN where all others are set)."""

from __future__ import annotations

import numpy as np

from kv_transfer.codecs.contract import Array
from kv_transfer.codecs.float_forms import U8
from kv_transfer.codecs.float_values import F32
from kv_transfer.codecs.float_values import widen_reference as widen

__all__ = ["DECODED", "look_up", "to_e4m3", "widen"]

S, W = np.float32, np.uint32


def _decoded() -> F32:
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    size[code & 0x7F == 0x7F] = np.nan
    return np.where(code < 128, size, -size).astype(S)


DECODED = _decoded()
"""Value of each code."""


def to_e4m3(x: F32, scale: np.float32, codes: U8) -> None:
    """codes of ``x * scale``, to the nearest, half to even. No product may be above 448."""
    scaled = x * scale
    bits = scaled.view(W)
    size = bits & W(0x7FFFFFFF)
    normal = (size + (size >> W(20) & W(1)) + W(0x7FFFF) - W(120 << 23)) >> W(20)
    # Below 2**-6 the sum with 2**14 rounds at 2**-9, where e4m3 has its last bit.
    small = (size.view(S) + S(2.0**14)).view(W) - W((127 + 14) << 23)
    codes[:] = np.where(size < W(121 << 23), small, normal) | bits >> W(24) & W(0x80)


def look_up(codes: U8, table: Array, out: Array) -> None:
    """out: ``table[code]`` for each."""
    out[:] = table[codes]
