"""Qwen3 (dense): heads of Q and K normalised, heads of 128 unless told, biases optional."""

from baton.checkpoint.families.biases import attention_biases
from baton.checkpoint.families.family import Family
from baton.checkpoint.families.windows import in_upper_layers

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    biases=attention_biases,
    sliding_windows=in_upper_layers,
    qk_norm=True,
    default_head_dim=128,
)
