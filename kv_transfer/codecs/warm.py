"""Compiling codecs before the first request needs them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kv_transfer.codecs.contract import Codec, KvGeometry, KvPart, array_dtype

_TOKENS = 80
"""More than a group of tokens (``int_groups``): of fewer, quantisers send the raw bytes."""


def warm_up(codecs: Iterable[Codec], geometry: KvGeometry) -> None:
    """Codes a little KV with each. Takes seconds a codec where nothing is compiled yet, and
    milliseconds later: call it while a worker starts, not on its event loop."""
    shape = (1, 2, _TOKENS, geometry.num_kv_heads, geometry.head_dim)
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    if geometry.dtype == "float32":
        kv = values
    elif geometry.dtype == "float16":
        kv = values.astype(np.float16).view(array_dtype("float16"))
    else:
        kv = (values.view(np.uint32) >> 16).astype(array_dtype("bfloat16"))
    part, out = KvPart(0, 0, _TOKENS), np.empty_like(kv)
    for codec in codecs:
        codec.decode(codec.encode(kv, part), part, out)
