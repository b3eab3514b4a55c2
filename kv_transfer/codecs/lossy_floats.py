"""Between the bits of a layout's dtype and float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kv_transfer.codecs.contract import Array

F32 = NDArray[np.float32]
_FLOAT16_MAX = np.float32(65504)


def widened(kv: Array, dtype: str) -> F32:
    if dtype == "float32":
        return kv
    if dtype == "float16":
        return kv.view(np.float16).astype(np.float32)
    return (kv.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrowed(x: F32, dtype: str) -> Array:
    """Rounded half to even; float16 stays finite where ``x`` is."""
    if dtype == "float32":
        return x
    if dtype == "float16":
        return np.clip(x, -_FLOAT16_MAX, _FLOAT16_MAX).astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded.astype(np.uint16)
