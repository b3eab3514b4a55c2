"""KV on the wire is the whole model's, that of a rank has fewer heads: one into the other.

Bytes of the wire: ``[layers, 2, tokens, kv_heads, head_dim]``; of a rank, fewer KV heads. Layers,
K and V, and tokens are rows alike here: one block of them, in the words of the plan that both
ends of a hand-over go by (``baton.protocol.reshard``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from baton.engine.kv_cache import Bytes
from baton.protocol.errors import InternalError
from baton.protocol.layout import DTYPE_BYTES, KvLayout
from baton.protocol.reshard import Placed, plan_copies

Rows = NDArray[np.uint8]
"""``[rows, kv_heads, bytes of a head]``."""


def join_heads(parts: Sequence[Bytes], layout: KvLayout) -> memoryview:
    """parts: of all ranks, equally long."""
    own = layout.of_rank(len(parts))
    sources = [_rows_of(part, own) for part in parts]
    whole = _empty(len(sources[0]), layout)
    _copy(sources, [whole], layout)
    return whole.reshape(-1).data


def split_heads(
    payload: Bytes, num_layer_tokens: int, layout: KvLayout, num_ranks: int
) -> list[memoryview]:
    """One copy for each rank. Raises InternalError when the length does not fit."""
    given = memoryview(payload).nbytes
    expected = num_layer_tokens * layout.bytes_per_token_layer
    if given != expected:
        raise InternalError(
            f"KV payload has {given} bytes; {expected} expected for {num_layer_tokens} "
            f"layers x tokens of {layout}"
        )
    whole = _rows_of(payload, layout)
    own = layout.of_rank(num_ranks)
    parts = [_empty(len(whole), own) for _ in range(num_ranks)]
    _copy([whole], parts, layout)
    return [part.reshape(-1).data for part in parts]


def _copy(sources: Sequence[Rows], targets: Sequence[Rows], layout: KvLayout) -> None:
    num_rows = len(sources[0])
    source, target = (Placed(len(side), num_rows, (0,)) for side in (sources, targets))
    for copy in plan_copies(layout.num_kv_heads, source, target, range(num_rows)):
        taken = slice(copy.source_head, copy.source_head + copy.num_heads)
        given = slice(copy.target_head, copy.target_head + copy.num_heads)
        targets[copy.target_rank][:, given] = sources[copy.source_rank][:, taken]


def _rows_of(payload: Bytes, layout: KvLayout) -> Rows:
    return np.frombuffer(payload, dtype=np.uint8).reshape(-1, *_row(layout))


def _empty(num_rows: int, layout: KvLayout) -> Rows:
    return np.empty((num_rows, *_row(layout)), dtype=np.uint8)


def _row(layout: KvLayout) -> tuple[int, int]:
    """K or V of one token in one layer."""
    return layout.num_kv_heads, layout.head_dim * DTYPE_BYTES[layout.dtype]
