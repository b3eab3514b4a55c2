"""Qwen2 and Qwen2.5: biases on Q, K and V always, a sliding window in upper layers if asked."""

from baton.checkpoint.families.family import Biases, Family
from baton.checkpoint.families.windows import in_upper_layers
from baton.checkpoint.fields import Fields


def _biases(config: Fields) -> Biases:
    if config.boolean("mlp_bias", False):
        config.unsupported("mlp_bias", "false in this family")
    return Biases(qkv=True)


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    biases=_biases,
    sliding_windows=in_upper_layers,
)
