"""A model that can run: a checkpoint's parameters in the hands of a backend."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from baton.checkpoint.spec import ModelSpec
from baton.engine.models.attention_spec import AttentionSpec
from baton.engine.models.backend import Backend, Embedding, GroupedProduct, Product
from baton.engine.models.parameters import Experts, LayerParameters, Mlp, Parameters


@dataclass(frozen=True, slots=True)
class DenseMlp:
    gate_up: Product
    down: Product


@dataclass(frozen=True, slots=True)
class ExpertMlp:
    """num_chosen, normalized: as ``ExpertSpec`` says."""

    router: Product
    gate_up: GroupedProduct
    down: GroupedProduct
    num_chosen: int
    normalized: bool


@dataclass(frozen=True, slots=True)
class Layer:
    """attention_out_norm, mlp_out_norm: of what each block gives back; None in most families."""

    input_norm: Tensor
    qkv: Product
    attention: AttentionSpec
    output: Product
    attention_out_norm: Tensor | None
    mlp_norm: Tensor
    mlp: DenseMlp | ExpertMlp
    mlp_out_norm: Tensor | None


@dataclass(frozen=True, slots=True)
class Model:
    embedding: Embedding
    layers: tuple[Layer, ...]
    final_norm: Tensor
    lm_head: Product


def assemble(spec: ModelSpec, parameters: Parameters, backend: Backend) -> Model:
    """``parameters`` are used up: see ``Backend``."""
    embedding, lm_head = backend.embedding_and_head(parameters.embedding, parameters.lm_head)
    return Model(
        embedding=embedding,
        layers=tuple(
            _layer(spec, number, layer, backend) for number, layer in enumerate(parameters.layers)
        ),
        final_norm=backend.norm_weight(parameters.final_norm),
        lm_head=lm_head,
    )


def _layer(spec: ModelSpec, number: int, layer: LayerParameters, backend: Backend) -> Layer:
    def norm(weight: Tensor | None) -> Tensor | None:
        return None if weight is None else backend.norm_weight(weight)

    return Layer(
        input_norm=backend.norm_weight(layer.input_norm),
        qkv=backend.product(layer.qkv, layer.qkv_bias),
        attention=AttentionSpec(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            scale=spec.scales.attention,
            soft_cap=spec.scales.attention_soft_cap,
            window=spec.sliding_windows[number],
            norms=_head_norms(spec, layer, backend),
            eps=spec.rms_norm_eps,
        ),
        output=backend.product(layer.output, layer.output_bias),
        attention_out_norm=norm(layer.attention_out_norm),
        mlp_norm=backend.norm_weight(layer.mlp_norm),
        mlp=_mlp(spec, layer.mlp, backend),
        mlp_out_norm=norm(layer.mlp_out_norm),
    )


def _head_norms(
    spec: ModelSpec, layer: LayerParameters, backend: Backend
) -> tuple[Tensor, Tensor] | None:
    if layer.qk_norm is None:
        return None
    q, k = layer.qk_norm[0], layer.qk_norm[spec.num_heads]
    return backend.norm_weight(q), backend.norm_weight(k)


def _mlp(spec: ModelSpec, mlp: Mlp | Experts, backend: Backend) -> DenseMlp | ExpertMlp:
    if isinstance(mlp, Experts):
        return ExpertMlp(
            router=backend.product(mlp.router, None),
            gate_up=backend.grouped(mlp.gate_up, spec.activation),
            down=backend.grouped(mlp.down, None),
            num_chosen=mlp.num_chosen,
            normalized=mlp.normalized,
        )
    return DenseMlp(
        gate_up=backend.gated(mlp.gate_up, mlp.gate_up_bias, spec.activation),
        down=backend.product(mlp.down, mlp.down_bias),
    )
