"""The decoder's tensors, and where each tensor of a checkpoint goes in them.

Projections that read the same input are stored as one matrix (Q, K, V; gate, up), so that a
layer does one product for them. Every matrix is ``[out_features, in_features]``; those of
experts have the expert in front.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.checkpoint.families import ExpertSpec
from baton.checkpoint.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Mlp:
    """gate_up: ``[2 * inner, hidden]``. down: ``[hidden, inner]``."""

    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Experts:
    """router: ``[E, hidden]``. gate_up: ``[E, 2 * inner, hidden]``. down: ``[E, hidden, inner]``.

    num_chosen, normalized: as ``ExpertSpec`` says.
    """

    router: Tensor
    gate_up: Tensor
    down: Tensor
    num_chosen: int
    normalized: bool


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """qk_norm: ``[H + K, D]``, one row per head of Q and K (equal rows among Q, among K).

    attention_out_norm, mlp_out_norm: of what each block gives back; None in most families.
    """

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    attention_out_norm: Tensor | None
    mlp_norm: Tensor
    mlp: Mlp | Experts
    mlp_out_norm: Tensor | None


@dataclass(frozen=True, slots=True)
class Parameters:
    """lm_head is the same tensor as embedding where the checkpoint ties them."""

    embedding: Tensor
    layers: tuple[LayerParameters, ...]
    final_norm: Tensor
    lm_head: Tensor


@dataclass(frozen=True, slots=True)
class Destination:
    """view: what a checkpoint's tensor is copied into; its shape is the shape required.

    repeated: the tensor is one row, and goes into every row of ``view``.
    offset: added to every element on the way.
    segments: rows of the tensors that were stored below each other as this one; () for one. Of
      several ranks each has a part of every segment.
    summed: ranks add their results to each other, so that only one of them may have this bias.
    """

    view: Tensor
    repeated: bool = False
    offset: float = 0.0
    segments: tuple[int, ...] = ()
    summed: bool = False


def allocate(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Parameters:
    """Uninitialised tensors: every one of them is a destination that loading must fill.

    Norms that store their weight less one are float32 whatever ``dtype`` says: near one,
    bfloat16 would keep one bit in a hundred of the weight.
    """

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def norm(*shape: int) -> Tensor:
        kept = torch.float32 if spec.norm_offset else dtype
        return torch.empty(shape, dtype=kept, device=device)

    hidden = spec.hidden_size
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    qkv_size = q_size + 2 * kv_size
    num_qk_heads = spec.num_heads + spec.num_kv_heads

    def mlp(experts: ExpertSpec | None) -> Mlp | Experts:
        if experts is None:
            inner = spec.intermediate_size
            return Mlp(
                gate_up=empty(2 * inner, hidden),
                gate_up_bias=empty(2 * inner) if spec.mlp_bias else None,
                down=empty(hidden, inner),
                down_bias=empty(hidden) if spec.mlp_bias else None,
            )
        count, inner = experts.num_experts, experts.intermediate_size
        return Experts(
            router=empty(count, hidden),
            gate_up=empty(count, 2 * inner, hidden),
            down=empty(count, hidden, inner),
            num_chosen=experts.num_chosen,
            normalized=experts.normalized,
        )

    def layer(experts: ExpertSpec | None) -> LayerParameters:
        return LayerParameters(
            input_norm=norm(hidden),
            qkv=empty(qkv_size, hidden),
            qkv_bias=empty(qkv_size) if spec.qkv_bias else None,
            qk_norm=norm(num_qk_heads, spec.head_dim) if spec.qk_norm else None,
            output=empty(hidden, q_size),
            output_bias=empty(hidden) if spec.output_bias else None,
            attention_out_norm=norm(hidden) if spec.names.attention_out_norm else None,
            mlp_norm=norm(hidden),
            mlp=mlp(experts),
            mlp_out_norm=norm(hidden) if spec.names.mlp_out_norm else None,
        )

    embedding = empty(spec.vocab_size, hidden)
    return Parameters(
        embedding=embedding,
        layers=tuple(layer(experts) for experts in spec.experts),
        final_norm=norm(hidden),
        lm_head=embedding if spec.tie_word_embeddings else empty(spec.vocab_size, hidden),
    )


def destinations(spec: ModelSpec, parameters: Parameters) -> dict[str, Destination]:
    """Checkpoint tensor name -> where it goes."""
    named = {
        "model.embed_tokens.weight": Destination(parameters.embedding),
        "model.norm.weight": Destination(parameters.final_norm, offset=spec.norm_offset),
    }
    if not spec.tie_word_embeddings:
        named["lm_head.weight"] = Destination(parameters.lm_head)
    for number, layer in enumerate(parameters.layers):
        for name, destination in _of_layer(spec, layer):
            named[f"model.layers.{number}.{name}"] = destination
    return named


Named = Iterator[tuple[str, Destination]]


def _of_layer(spec: ModelSpec, layer: LayerParameters) -> Named:
    names = spec.names
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    yield from _parts(names.qkv, layer.qkv, layer.qkv_bias, (q_size, kv_size, kv_size))
    yield from _summed(names.output, layer.output, layer.output_bias)
    norms = (
        (names.input_norm, layer.input_norm),
        (names.attention_out_norm, layer.attention_out_norm),
        (names.mlp_norm, layer.mlp_norm),
        (names.mlp_out_norm, layer.mlp_out_norm),
    )
    for name, weight in norms:
        if weight is not None:
            yield f"{name}.weight", Destination(weight, offset=spec.norm_offset)
    if layer.qk_norm is not None:
        q, k = torch.split(layer.qk_norm, [spec.num_heads, spec.num_kv_heads])
        for name, rows in (("q", q), ("k", k)):
            yield (
                f"self_attn.{name}_norm.weight",
                Destination(rows, repeated=True, offset=spec.norm_offset),
            )
    if isinstance(layer.mlp, Experts):
        yield from _of_experts(spec, layer.mlp)
    else:
        halves = (spec.intermediate_size,) * 2
        yield from _parts(names.gate_up, layer.mlp.gate_up, layer.mlp.gate_up_bias, halves)
        yield from _summed(names.down, layer.mlp.down, layer.mlp.down_bias)


def _of_experts(spec: ModelSpec, experts: Experts) -> Named:
    names = spec.names
    yield f"{names.router}.weight", Destination(experts.router)
    for number, (gate_up, down) in enumerate(zip(experts.gate_up, experts.down, strict=True)):
        prefix = names.expert.format(number)
        halves = (gate_up.shape[0] // 2,) * 2
        yield from _parts([prefix + n for n in names.expert_gate_up], gate_up, None, halves)
        yield from _summed(prefix + names.expert_down, down, None)


def _parts(
    names: Sequence[str], weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...]
) -> Named:
    """Stored one below the other in parts of ``sizes`` rows, by a name each or by one for all."""
    for kind, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if len(names) == 1:
            yield f"{names[0]}.{kind}", Destination(tensor, segments=sizes)
        else:
            for name, view in zip(names, torch.split(tensor, list(sizes)), strict=True):
                yield f"{name}.{kind}", Destination(view)


def _summed(name: str, weight: Tensor, bias: Tensor | None) -> Named:
    yield f"{name}.weight", Destination(weight)
    if bias is not None:
        yield f"{name}.bias", Destination(bias, summed=True)
