"""What can differ between two families that share one decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from baton.checkpoint.families.biases import Biases
from baton.checkpoint.families.names import LLAMA_NAMES, TensorNames
from baton.checkpoint.fields import Fields
from baton.checkpoint.rope_fields import RopeContext, RopeSpec, read_rope


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """A layer whose MLP is a choice of experts.

    num_chosen: experts per token, those with the largest router probability.
    intermediate_size: of each expert. normalized: the chosen probabilities are made to sum to 1.
    """

    num_experts: int
    num_chosen: int
    intermediate_size: int
    normalized: bool


@dataclass(frozen=True, slots=True)
class Scales:
    """attention: factor on the scores, ``head_dim ** -0.5`` in most families. embedding: factor
    on the token embeddings. The soft caps squeeze a value x to ``cap * tanh(x / cap)``: scores
    before the mask, logits at the end; None for none."""

    attention: float
    attention_soft_cap: float | None = None
    embedding: float = 1.0
    logit_soft_cap: float | None = None


def plain_scales(config: Fields, hidden_size: int, head_dim: int) -> Scales:
    return Scales(attention=head_dim**-0.5)


def dense(config: Fields, num_layers: int) -> tuple[ExpertSpec | None, ...]:
    """No layer has experts."""
    return (None,) * num_layers


def same_rope(
    config: Fields, windows: tuple[int | None, ...], context: RopeContext
) -> tuple[RopeSpec, ...]:
    """One set of RoPE parameters for all layers."""
    return (read_rope(config, context),) * len(windows)


@dataclass(frozen=True, slots=True)
class Family:
    """name: ``model_type``. architecture: the one entry of ``architectures``.

    biases(config): raises for settings that the family does not know.
    sliding_windows(config, num_layers): one entry per layer, None for full attention.
    qk_norm: heads of Q and K are normalised before RoPE.
    default_head_dim: where head_dim is absent; None for hidden_size / num_heads.
    kv_heads_required: num_key_value_heads must be there, because readers disagree on what
      its absence means; otherwise absent means one per attention head.
    names: of the tensors in the checkpoint.
    ropes(config, sliding_windows, context): one entry per layer.
    experts(config, num_layers): one entry per layer, None for a plain MLP.
    scales(config, hidden_size, head_dim).
    norm_offset: what a norm multiplies with is its stored weight plus this.
    activation_field: names the gate's activation; default_activation: where it is absent.
    partial_rotary: the family knows ``partial_rotary_factor``.
    tied_by_default, default_rms_norm_eps, default_theta: where config.json is silent.
    """

    name: str
    architecture: str
    biases: Callable[[Fields], Biases]
    sliding_windows: Callable[[Fields, int], tuple[int | None, ...]]
    qk_norm: bool = False
    default_head_dim: int | None = None
    kv_heads_required: bool = True
    names: TensorNames = LLAMA_NAMES
    ropes: Callable[[Fields, tuple[int | None, ...], RopeContext], tuple[RopeSpec, ...]] = same_rope
    experts: Callable[[Fields, int], tuple[ExpertSpec | None, ...]] = dense
    scales: Callable[[Fields, int, int], Scales] = plain_scales
    norm_offset: float = 0.0
    activation_field: str = "hidden_act"
    default_activation: str = "silu"
    partial_rotary: bool = False
    tied_by_default: bool = False
    default_rms_norm_eps: float = 1e-6
    default_theta: float = 10_000.0
