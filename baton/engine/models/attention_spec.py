"""The attention of one layer, as data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """scale: of the scores. window: how many newest tokens a token sees, itself included.

    norms: RMSNorm weights ``[D]`` of each head of Q and of K, applied before RoPE, with eps.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    soft_cap: float | None
    window: int | None
    norms: tuple[Tensor, Tensor] | None
    eps: float
