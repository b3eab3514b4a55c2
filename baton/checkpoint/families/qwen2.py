"""Qwen2 and Qwen2.5: biases on Q, K and V always, a sliding window in upper layers if asked."""

from baton.checkpoint.families.biases import qkv_biases
from baton.checkpoint.families.family import Family
from baton.checkpoint.families.windows import in_upper_layers

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    biases=qkv_biases,
    sliding_windows=in_upper_layers,
)
