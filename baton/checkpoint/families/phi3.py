"""Phi-3, Phi-3.5 and Phi-4 (mini): projections stored fused, part of a head turned, longrope."""

from baton.checkpoint.families.biases import no_biases
from baton.checkpoint.families.family import Family
from baton.checkpoint.families.names import TensorNames
from baton.checkpoint.families.windows import same_in_all_layers_if_given

PHI3 = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    biases=no_biases,
    sliding_windows=same_in_all_layers_if_given,
    kv_heads_required=False,
    names=TensorNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
    partial_rotary=True,
    default_rms_norm_eps=1e-5,
)
