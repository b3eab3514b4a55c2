"""The forward pass, written once for every family.

Shapes: T rows (tokens of a step), H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, silu

from baton.checkpoint.spec import ModelSpec
from baton.engine.attention import attend
from baton.engine.kv_cache import KvCache
from baton.engine.models.parameters import LayerParameters, Parameters
from baton.engine.rope import Rotation, rotate, rotation
from baton.engine.step_inputs import StepInputs


def forward(
    spec: ModelSpec,
    parameters: Parameters,
    inputs: StepInputs,
    cache: KvCache,
    frequencies: Tensor,
) -> Tensor:
    """Logits ``[S, vocab]`` float32 of ``inputs.sample_rows``; K and V of all rows are stored.

    Rows that do not sample end before the final norm: nobody reads their logits.
    """
    hidden = embedding(inputs.token_ids, parameters.embedding)
    turn = rotation(inputs.positions, frequencies, hidden.dtype)
    for number, layer in enumerate(parameters.layers):
        normed = _norm(spec, hidden, layer.input_norm)
        hidden = hidden + _attention(spec, layer, normed, inputs, cache, number, turn)
        hidden = hidden + _mlp(layer, _norm(spec, hidden, layer.post_norm))
    last = hidden.index_select(0, inputs.sample_rows)
    return linear(_norm(spec, last, parameters.final_norm), parameters.lm_head).float()


def _norm(spec: ModelSpec, rows: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(rows, (spec.hidden_size,), weight, spec.rms_norm_eps)


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
    if layer.qk_norm is not None:
        qk = rms_norm(qk, (spec.head_dim,), None, spec.rms_norm_eps) * layer.qk_norm
    qk = rotate(qk, turn).to(cache.blocks.dtype)
    q, k = qk[:, : spec.num_heads], qk[:, spec.num_heads :]
    v = v.to(cache.blocks.dtype)
    cache.put(number, inputs.slots, k, v)
    index = inputs.attention[spec.sliding_windows[number]]
    mixed = attend(q, k, v, cache, number, index)
    return linear(mixed.to(rows.dtype), layer.output, layer.output_bias)


def _mlp(layer: LayerParameters, rows: Tensor) -> Tensor:
    gate, up = linear(rows, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
    return linear(silu(gate) * up, layer.down, layer.down_bias)
