"""Tiles of keys and values out of the paged cache, as every attention kernel reads them."""

from __future__ import annotations

from typing import Any

from baton.engine.kernels.jit import jit, tl


@jit
def load_kv(
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    table: tl.tensor,
    keys: tl.tensor,
    stored: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,
) -> Any:
    """K ``[D, N]`` and V ``[N, D]`` of one sequence's positions ``keys`` (``[N]``).

    key_ptr, value_ptr: of the KV head in slot 0. table: the sequence's block ids. MASKED: a
    position that is not ``stored`` is not read, its block id neither, and gives 0.
    """
    columns = tl.arange(0, BLOCK_D)
    in_head = columns < HEAD_DIM
    if MASKED:
        blocks = tl.load(table + keys // BLOCK_SIZE, mask=stored, other=0)
    else:
        blocks = tl.load(table + keys // BLOCK_SIZE)
    places = blocks.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE
    places *= NUM_KV_HEADS * HEAD_DIM
    k_places = key_ptr + places[None, :] + columns[:, None]
    v_places = value_ptr + places[:, None] + columns[None, :]
    if MASKED or BLOCK_D > HEAD_DIM:
        k = tl.load(k_places, mask=stored[None, :] & in_head[:, None], other=0.0)
        v = tl.load(v_places, mask=stored[:, None] & in_head[None, :], other=0.0)
    else:
        k = tl.load(k_places)
        v = tl.load(v_places)
    if DOT_IN_FP32:
        k, v = k.to(tl.float32), v.to(tl.float32)
    return k, v
