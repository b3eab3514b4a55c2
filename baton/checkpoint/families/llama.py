"""Llama 1 to 3.x: full attention, optional biases, grouped-query attention since Llama 2."""

from baton.checkpoint.families.biases import attention_and_mlp_biases
from baton.checkpoint.families.family import Family
from baton.checkpoint.families.windows import full_attention_only

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    biases=attention_and_mlp_biases,
    sliding_windows=full_attention_only,
    kv_heads_required=False,
)
