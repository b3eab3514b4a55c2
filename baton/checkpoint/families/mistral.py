"""Mistral: no biases anywhere, one sliding window for all layers or none."""

from baton.checkpoint.families.biases import no_biases
from baton.checkpoint.families.family import Family
from baton.checkpoint.families.windows import same_in_all_layers

MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    biases=no_biases,
    sliding_windows=same_in_all_layers,
)
