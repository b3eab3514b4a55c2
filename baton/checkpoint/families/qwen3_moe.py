"""Qwen3-MoE: Qwen3's attention; which layers have experts is a rhythm with exceptions."""

from baton.checkpoint.families.biases import attention_biases
from baton.checkpoint.families.experts import read_experts
from baton.checkpoint.families.family import ExpertSpec, Family
from baton.checkpoint.families.windows import same_in_all_layers_if_used
from baton.checkpoint.fields import Fields


def _experts(config: Fields, num_layers: int) -> tuple[ExpertSpec | None, ...]:
    """Every ``decoder_sparse_step``-th layer but those in ``mlp_only_layers``."""
    experts = read_experts(
        config,
        "moe_intermediate_size",
        normalized=config.boolean("norm_topk_prob", False),
        default_chosen=8,
    )
    step = config.integer("decoder_sparse_step", 1, num_layers, default=1)
    dense = config.integers("mlp_only_layers", 0, num_layers - 1)
    return tuple(
        experts if layer not in dense and (layer + 1) % step == 0 else None
        for layer in range(num_layers)
    )


QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    biases=attention_biases,
    sliding_windows=same_in_all_layers_if_used,
    qk_norm=True,
    experts=_experts,
)
