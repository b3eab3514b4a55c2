"""Phi-3, Phi-3.5 and Phi-4 (mini): projections stored fused, part of a head turned, longrope."""

from baton.checkpoint.families.family import Biases, Family
from baton.checkpoint.families.names import TensorNames
from baton.checkpoint.families.windows import same_in_all_layers_if_given
from baton.checkpoint.fields import Fields


def _biases(config: Fields) -> Biases:
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
        if config.boolean(name, False):
            config.unsupported(name, "false in this family")
    return Biases()


PHI3 = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    biases=_biases,
    sliding_windows=same_in_all_layers_if_given,
    kv_heads_required=False,
    names=TensorNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
    partial_rotary=True,
    default_rms_norm_eps=1e-5,
)
