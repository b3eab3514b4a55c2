"""Where a family's checkpoint keeps the tensors of one layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Names within ``model.layers.<n>.``, without ``.weight`` or ``.bias``.

    qkv, gate_up: the tensors that, one below the other, make the projection; a single name is a
      tensor that is stored fused. The other pairs follow the order of the decoder's fields.
    attention_out_norm, mlp_out_norm: norms of what attention and MLP give back, before it is
      added to the hidden rows; None where a family has none.
    router, expert, expert_gate_up, expert_down: of layers with experts; ``expert`` holds one
      ``{}`` for the expert's number, the two others follow it.
    """

    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    input_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attention_out_norm: str | None = None
    mlp_out_norm: str | None = None
    router: str = "mlp.gate"
    expert: str = "mlp.experts.{}."
    expert_gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    expert_down: str = "down_proj"


LLAMA_NAMES = TensorNames()
