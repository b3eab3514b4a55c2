"""KV on the wire is the whole model's: the ranks' heads side by side, in the order of ranks.

Bytes of the wire: ``[layers, 2, tokens, kv_heads, head_dim]``; of a rank, fewer KV heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from baton.engine.kv_cache import Bytes
from baton.protocol.errors import InternalError
from baton.protocol.layout import KvLayout


def join_heads(parts: Sequence[Bytes], layout: KvLayout) -> memoryview:
    """parts: of all ranks, equally long."""
    width = _row_bytes(layout) // len(parts)
    rows = [np.frombuffer(part, dtype=np.uint8).reshape(-1, width) for part in parts]
    return np.concatenate(rows, axis=1).reshape(-1).data


def split_heads(
    payload: Bytes, num_layer_tokens: int, layout: KvLayout, num_ranks: int
) -> list[memoryview]:
    """One copy for each rank. Raises InternalError when the length does not fit."""
    given = np.frombuffer(payload, dtype=np.uint8)
    expected = num_layer_tokens * layout.bytes_per_token_layer
    if given.nbytes != expected:
        raise InternalError(
            f"KV payload has {given.nbytes} bytes; {expected} expected for {num_layer_tokens} "
            f"layers x tokens of {layout}"
        )
    parts = given.reshape(-1, num_ranks, _row_bytes(layout) // num_ranks)
    return [np.ascontiguousarray(parts[:, n]).reshape(-1).data for n in range(num_ranks)]


def _row_bytes(layout: KvLayout) -> int:
    """K or V of one token in one layer."""
    return layout.bytes_per_token_layer // 2
