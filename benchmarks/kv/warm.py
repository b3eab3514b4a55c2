"""Codecs compiled and their tables in the caches before anything is timed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from baton.protocol.layout import KvLayout
from kv_transfer.coding import KvCoding
from kv_transfer.frames import RAW, FrameCut

NUM_TOKENS = 64


def warm(coding: KvCoding, layout: KvLayout, names: Sequence[str]) -> None:
    """layout: of bfloat16."""
    group = layout.groups[0]
    shape = (layout.num_layers, 2, NUM_TOKENS, group.num_kv_heads, group.head_dim)
    noise = np.random.default_rng(0).standard_normal(shape, np.float32)
    kv = (noise.view(np.uint32) >> 16).astype(np.uint16)
    cut = FrameCut(0, layout.num_layers, 0, NUM_TOKENS)
    for name in names:
        if name != RAW:
            stream = coding.encode(name, kv.reshape(-1).view(np.uint8).data, cut, NUM_TOKENS)
            coding.decode(name, stream, cut, NUM_TOKENS)
