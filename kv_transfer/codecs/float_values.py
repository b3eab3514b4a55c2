"""Values of bfloat16 and float16 as float32 and back, in numpy and compiled, the same bits.

Back is to the nearest, half to even; what would round to infinity becomes the largest number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_transfer.codecs.contract import Array
from kv_transfer.codecs.jit import kernel, primitive

F32 = NDArray[np.float32]
W, S = np.uint32, np.float32
LARGEST = {"bfloat16": S(2.0**127 * (2 - 2.0**-7)), "float16": S(65504)}
TAME_EXPONENT = 100
"""Quantisers take values below 2**100: their arithmetic neither overflows nor loses all bits."""


def is_tame(values: Array, dtype: str) -> bool:
    """Whether all values are finite and below 2**100 in size.

    values: as in ``contract``; float16 is always below.
    """
    if dtype == "float32":
        exponents = values.reshape(-1).view(np.uint32) >> 23 & 0xFF
    elif dtype == "bfloat16":
        exponents = values.reshape(-1) >> 7 & 0xFF
    else:
        return bool(((values.reshape(-1) >> 10 & 0x1F) < 31).all())
    return bool((exponents < 127 + TAME_EXPONENT).all())


def widen_reference(values: Array, dtype: str) -> F32:
    """values: any shape; the result has it too."""
    if dtype == "float32":
        return values.astype(np.float32)
    if dtype == "float16":
        return values.view(np.float16).astype(np.float32)
    return (values.astype(np.uint32) << 16).view(np.float32)


def narrow_reference(x: F32, dtype: str, out: Array) -> None:
    if dtype == "float32":
        out[...] = x
        return
    kept = np.clip(x, -LARGEST[dtype], LARGEST[dtype])
    if dtype == "float16":
        out[...] = kept.astype(np.float16).view(np.uint16)
        return
    bits = kept.view(np.uint32)
    out[...] = (bits + (bits >> 16 & 1) + 0x7FFF >> 16).astype(np.uint16)


def widen(values: Array, dtype: str) -> F32:
    """As ``widen_reference``."""
    if dtype == "float32":
        return values
    out = np.empty(values.shape, np.float32)
    _WIDEN[dtype](values.reshape(-1), out.reshape(-1))
    return out


def narrow(x: F32, dtype: str, out: Array) -> None:
    """As ``narrow_reference``; ``out`` C-contiguous."""
    assert x.shape == out.shape, (x.shape, out.shape)
    if dtype == "float32":
        out[...] = x
    else:
        _NARROW[dtype](x.reshape(-1), out.reshape(-1))


@primitive
def float_of(bits: Any) -> Any:
    return W(bits).view(np.float32)


@primitive
def bits_of_float(x: Any) -> Any:
    return S(x).view(np.uint32)


@kernel
def _widen_bfloat16(values: Any, out: Any) -> None:
    for i in range(values.size):
        out[i] = float_of(W(values[i]) << W(16))


@kernel
def _widen_float16(values: Any, out: Any) -> None:
    """Exponent and mantissa in float32's places are 2**112 too small, subnormals as well."""
    for i in range(values.size):
        h = W(values[i])
        size = float_of((h & W(0x7FFF)) << W(13)) * S(2.0**112)
        out[i] = float_of(bits_of_float(size) | (h & W(0x8000)) << W(16))


@primitive
def _clipped(x: Any, largest: Any) -> Any:
    x = x if x < largest else largest
    return x if x > -largest else -largest


@kernel
def _narrow_bfloat16(x: Any, out: Any) -> None:
    for i in range(x.size):
        bits = bits_of_float(_clipped(x[i], S(2.0**127 * (2 - 2.0**-7))))
        out[i] = np.uint16((bits + ((bits >> W(16)) & W(1)) + W(0x7FFF)) >> W(16))


@kernel
def _narrow_float16(x: Any, out: Any) -> None:
    """Below 2**-14 the sum with 1/2 rounds at 2**-24, where subnormals have their last bit."""
    for i in range(x.size):
        bits = bits_of_float(_clipped(x[i], S(65504)))
        size = bits & W(0x7FFFFFFF)
        normal = (size + ((size >> W(13)) & W(1)) + W(0xFFF) - W(112 << 23)) >> W(13)
        small = bits_of_float(float_of(size) + S(0.5)) - W(126 << 23)
        half = small if size < W(113 << 23) else normal
        out[i] = np.uint16(half | (bits >> W(16)) & W(0x8000))


_WIDEN: dict[str, Any] = {"bfloat16": _widen_bfloat16, "float16": _widen_float16}
_NARROW: dict[str, Any] = {"bfloat16": _narrow_bfloat16, "float16": _narrow_float16}
