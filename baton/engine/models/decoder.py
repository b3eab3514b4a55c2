"""The forward pass, written once for every family.

Shapes: T rows (tokens of a step), H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import gelu, linear, rms_norm, silu

from baton.checkpoint.spec import ModelSpec
from baton.engine.attention import attend
from baton.engine.kv_cache import KvCache
from baton.engine.models.experts import mix_experts
from baton.engine.models.parameters import Experts, LayerParameters, Mlp, Parameters
from baton.engine.parallel.group import ALONE, Group
from baton.engine.rope import Rotary, Rotation, rotate
from baton.engine.step_inputs import StepInputs


def forward(
    spec: ModelSpec,
    parameters: Parameters,
    inputs: StepInputs,
    cache: KvCache,
    rotary: Rotary,
    group: Group = ALONE,
) -> Tensor:
    """Logits ``[S, vocab]`` float32 of ``inputs.sample_rows``; K and V of all rows are stored.

    Rows that do not sample end before the final norm: nobody reads their logits. With several
    ranks, ``spec`` and ``parameters`` are this rank's part, and rank 0 alone gets the logits.
    """
    hidden = _embed(spec, parameters, inputs.token_ids, group)
    turns = rotary.rotations(inputs.positions)
    for number, layer in enumerate(parameters.layers):
        normed = _norm(hidden, layer.input_norm, spec)
        mixed = _attention(spec, layer, normed, inputs, cache, number, turns[number])
        hidden = hidden + _norm(group.reduce(mixed), layer.attention_out_norm, spec)
        normed = _norm(hidden, layer.mlp_norm, spec)
        mixed = _mlp(spec, layer.mlp, normed)
        hidden = hidden + _norm(group.reduce(mixed), layer.mlp_out_norm, spec)
    last = hidden.index_select(0, inputs.sample_rows)
    logits = linear(_norm(last, parameters.final_norm, spec), parameters.lm_head)
    return soft_cap(group.join_logits(logits).float(), spec.scales.logit_soft_cap)


def soft_cap(values: Tensor, cap: float | None) -> Tensor:
    return values if cap is None else cap * (values / cap).tanh()


def _embed(spec: ModelSpec, parameters: Parameters, token_ids: Tensor, group: Group) -> Tensor:
    rows = group.embed(token_ids, parameters.embedding)
    scale = spec.scales.embedding
    # The factor is rounded to the rows' dtype first, as the models were trained.
    return rows if scale == 1.0 else rows * rows.new_tensor(scale)


def _norm(rows: Tensor, weight: Tensor | None, spec: ModelSpec) -> Tensor:
    """Over the last dimension, in float32, rounded once; None leaves the rows as they are."""
    if weight is None:
        return rows
    wide = rms_norm(rows.float(), rows.shape[-1:], None, spec.rms_norm_eps)
    return (wide * weight.float()).to(rows.dtype)


def _attention(
    spec: ModelSpec,
    layer: LayerParameters,
    rows: Tensor,
    inputs: StepInputs,
    cache: KvCache,
    number: int,
    turn: Rotation,
) -> Tensor:
    num_qk_heads = spec.num_heads + spec.num_kv_heads
    heads = linear(rows, layer.qkv, layer.qkv_bias).view(len(rows), -1, spec.head_dim)
    qk, v = heads[:, :num_qk_heads], heads[:, num_qk_heads:]
    qk = rotate(_norm(qk, layer.qk_norm, spec), turn).to(cache.blocks.dtype)
    q, k = qk[:, : spec.num_heads], qk[:, spec.num_heads :]
    v = v.to(cache.blocks.dtype)
    cache.put(number, inputs.slots, k, v)
    index = inputs.attention[spec.sliding_windows[number]]
    mixed = attend(q, k, v, cache, number, index, spec.scales)
    return linear(mixed.to(rows.dtype), layer.output, layer.output_bias)


def _mlp(spec: ModelSpec, mlp: Mlp | Experts, rows: Tensor) -> Tensor:
    gated = _silu_mul if spec.activation == "silu" else _gelu_tanh_mul
    if isinstance(mlp, Experts):
        return mix_experts(rows, mlp, gated)
    return linear(gated(linear(rows, mlp.gate_up, mlp.gate_up_bias)), mlp.down, mlp.down_bias)


def _silu_mul(gate_up: Tensor) -> Tensor:
    """``[T, 2 * I] -> [T, I]``, the gate in front."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def _gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gelu(gate, approximate="tanh") * up
