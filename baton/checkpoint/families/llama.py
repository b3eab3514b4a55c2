"""Llama 1 to 3.x: full attention, optional biases, grouped-query attention since Llama 2."""

from baton.checkpoint.families.family import Biases, Family
from baton.checkpoint.families.windows import full_attention_only
from baton.checkpoint.fields import Fields


def _biases(config: Fields) -> Biases:
    attention = config.boolean("attention_bias", False)
    return Biases(qkv=attention, output=attention, mlp=config.boolean("mlp_bias", False))


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    biases=_biases,
    sliding_windows=full_attention_only,
    kv_heads_required=False,
)
