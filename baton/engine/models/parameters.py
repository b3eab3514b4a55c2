"""The decoder's tensors, and where each tensor of a checkpoint goes in them.

Projections that read the same input are stored as one matrix (Q, K, V; gate, up), so that a
layer does one product for them. Every matrix is ``[out_features, in_features]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baton.checkpoint.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """qk_norm: ``[H + K, D]``, one row per head of Q and K (equal rows among Q, among K)."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Parameters:
    """lm_head is the same tensor as embedding where the checkpoint ties them."""

    embedding: Tensor
    layers: tuple[LayerParameters, ...]
    final_norm: Tensor
    lm_head: Tensor


def allocate(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Parameters:
    """Uninitialised tensors: every one of them is a destination that loading must fill."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    qkv_size = q_size + 2 * kv_size

    def layer() -> LayerParameters:
        return LayerParameters(
            input_norm=empty(hidden),
            qkv=empty(qkv_size, hidden),
            qkv_bias=empty(qkv_size) if spec.qkv_bias else None,
            qk_norm=empty(spec.num_heads + spec.num_kv_heads, spec.head_dim)
            if spec.qk_norm
            else None,
            output=empty(hidden, q_size),
            output_bias=empty(hidden) if spec.output_bias else None,
            post_norm=empty(hidden),
            gate_up=empty(2 * inner, hidden),
            gate_up_bias=empty(2 * inner) if spec.mlp_bias else None,
            down=empty(hidden, inner),
            down_bias=empty(hidden) if spec.mlp_bias else None,
        )

    embedding = empty(spec.vocab_size, hidden)
    return Parameters(
        embedding=embedding,
        layers=tuple(layer() for _ in range(spec.num_layers)),
        final_norm=empty(hidden),
        lm_head=embedding if spec.tie_word_embeddings else empty(spec.vocab_size, hidden),
    )


def destinations(spec: ModelSpec, parameters: Parameters) -> dict[str, Tensor]:
    """Checkpoint tensor name -> the view to copy it into (its shape is the shape required).

    A destination of shape ``[heads, D]`` made from a ``[D]`` tensor is a view with the rows
    expanded: see ``per_head``.
    """
    named = {
        "model.embed_tokens.weight": parameters.embedding,
        "model.norm.weight": parameters.final_norm,
    }
    if not spec.tie_word_embeddings:
        named["lm_head.weight"] = parameters.lm_head
    for number, layer in enumerate(parameters.layers):
        for name, view in _layer_destinations(spec, layer).items():
            named[f"model.layers.{number}.{name}"] = view
    return named


def per_head(spec: ModelSpec, parameters: Parameters) -> dict[str, Tensor]:
    """Names of ``[D]`` tensors that are copied into each row of a ``[heads, D]`` view."""
    named: dict[str, Tensor] = {}
    for number, layer in enumerate(parameters.layers):
        if layer.qk_norm is not None:
            q, k = torch.split(layer.qk_norm, [spec.num_heads, spec.num_kv_heads])
            named[f"model.layers.{number}.self_attn.q_norm.weight"] = q
            named[f"model.layers.{number}.self_attn.k_norm.weight"] = k
    return named


def _layer_destinations(spec: ModelSpec, layer: LayerParameters) -> dict[str, Tensor]:
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    named = {
        "input_layernorm.weight": layer.input_norm,
        "post_attention_layernorm.weight": layer.post_norm,
    }
    fused = {
        "self_attn.{}_proj": (("q", "k", "v"), layer.qkv, layer.qkv_bias),
        "mlp.{}_proj": (("gate", "up"), layer.gate_up, layer.gate_up_bias),
    }
    for pattern, (parts, weight, bias) in fused.items():
        sizes = [q_size, kv_size, kv_size] if len(parts) == 3 else [spec.intermediate_size] * 2
        for kind, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                for part, view in zip(parts, torch.split(tensor, sizes), strict=True):
                    named[f"{pattern.format(part)}.{kind}"] = view
    single = {
        "self_attn.o_proj": (layer.output, layer.output_bias),
        "mlp.down_proj": (layer.down, layer.down_bias),
    }
    for prefix, (weight, bias) in single.items():
        named[f"{prefix}.weight"] = weight
        if bias is not None:
            named[f"{prefix}.bias"] = bias
    return named
