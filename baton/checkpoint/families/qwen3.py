"""Qwen3 (dense): heads of Q and K normalised, heads of 128 unless told, biases optional."""

from baton.checkpoint.families.family import Biases, Family
from baton.checkpoint.families.windows import in_upper_layers
from baton.checkpoint.fields import Fields


def _biases(config: Fields) -> Biases:
    attention = config.boolean("attention_bias", False)
    if config.boolean("mlp_bias", False):
        config.unsupported("mlp_bias", "false in this family")
    return Biases(qkv=attention, output=attention)


QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    biases=_biases,
    sliding_windows=in_upper_layers,
    qk_norm=True,
    default_head_dim=128,
)
