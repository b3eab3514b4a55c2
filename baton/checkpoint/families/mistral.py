"""Mistral: no biases anywhere, one sliding window for all layers or none."""

from baton.checkpoint.families.family import Biases, Family
from baton.checkpoint.families.windows import same_in_all_layers
from baton.checkpoint.fields import Fields


def _biases(config: Fields) -> Biases:
    for name in ("attention_bias", "mlp_bias"):
        if config.boolean(name, False):
            config.unsupported(name, "false in this family")
    return Biases()


MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    biases=_biases,
    sliding_windows=same_in_all_layers,
)
