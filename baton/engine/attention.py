"""Attention of one layer over paged KV: decode rows in padded groups, prompts tile by tile.

Shapes: T rows, H query heads, K KV heads, G = H / K queries per KV head, L keys, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from baton.checkpoint.families import Scales
from baton.engine.kv_cache import KvCache
from baton.engine.step_inputs import AttentionIndex, DecodeGroup, PrefillTile


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KvCache,
    layer: int,
    index: AttentionIndex,
    scales: Scales,
) -> Tensor:
    """q: ``[T, H, D]``; k, v: ``[T, K, D]``, already in the cache. Returns ``[T, H * D]``.

    All three have the cache's dtype: what a token reads is the same rounded value, whether it
    comes from this step's rows or from the cache, so chunking does not change the numbers.
    """
    parts = [_decode(q, cache, layer, group, scales) for group in index.decode]
    parts += [_prefill(q, k, v, cache, layer, tile, scales) for tile in index.prefill]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _decode(q: Tensor, cache: KvCache, layer: int, group: DecodeGroup, scales: Scales) -> Tensor:
    """All rows of the group in one call; a KV head's G queries take the place of query rows."""
    num_rows = group.num_rows
    keys, values = cache.gather(layer, group.slots)
    num_kv_heads, head_dim = keys.shape[1:]
    queries = q[group.first_row : group.first_row + num_rows]
    by_row = (num_rows, -1, num_kv_heads, head_dim)
    out = _weigh(
        queries.view(num_rows, num_kv_heads, -1, head_dim),
        keys.view(by_row).transpose(1, 2),
        values.view(by_row).transpose(1, 2),
        group.mask,
        scales,
    )
    return out.reshape(num_rows, -1)


def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KvCache,
    layer: int,
    tile: PrefillTile,
    scales: Scales,
) -> Tensor:
    rows = slice(tile.first_row, tile.first_row + tile.num_rows)
    group_size = q.shape[1] // k.shape[1]
    if tile.slots is None:
        keys, values = k[rows], v[rows]
    else:
        keys, values = cache.gather(layer, tile.slots)
    fused = tile.slots is None and scales.attention_soft_cap is None
    if not fused:
        # CUDA kernels take grouped heads or a mask, but not both; the copies cost a CPU nothing.
        keys = keys.repeat_interleave(group_size, dim=1)
        values = values.repeat_interleave(group_size, dim=1)
    out = _weigh(
        q[rows].transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        tile.mask,
        scales,
        is_causal=tile.slots is None,
        enable_gqa=fused and group_size > 1,
    )
    return out[0].transpose(0, 1).reshape(tile.num_rows, -1)


def _weigh(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scales: Scales,
    *,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """q: ``[B, H, M, D]``; k, v: ``[B, H, L, D]``; mask: additive, to ``[B, H, M, L]``."""
    if scales.attention_soft_cap is None:
        return scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=is_causal,
            scale=scales.attention,
            enable_gqa=enable_gqa,
        )
    cap = scales.attention_soft_cap
    scores = cap * (q.float() @ k.float().transpose(2, 3) * (scales.attention / cap)).tanh()
    if is_causal:
        future = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(dim=-1) @ v.float()).to(q.dtype)
