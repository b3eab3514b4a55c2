"""What can differ between two families that share one decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from baton.checkpoint.fields import Fields


@dataclass(frozen=True, slots=True)
class Biases:
    """Which projections have a bias: Q, K and V together; attention output; all of the MLP."""

    qkv: bool = False
    output: bool = False
    mlp: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """name: ``model_type``. architecture: the one entry of ``architectures``.

    biases(config): raises for settings that the family does not know.
    sliding_windows(config, num_layers): one entry per layer, None for full attention.
    qk_norm: heads of Q and K are normalised before RoPE.
    default_head_dim: where head_dim is absent; None for hidden_size / num_heads.
    kv_heads_required: num_key_value_heads must be there, because readers disagree on what
      its absence means; otherwise absent means one per attention head.
    """

    name: str
    architecture: str
    biases: Callable[[Fields], Biases]
    sliding_windows: Callable[[Fields, int], tuple[int | None, ...]]
    qk_norm: bool = False
    default_head_dim: int | None = None
    kv_heads_required: bool = True
