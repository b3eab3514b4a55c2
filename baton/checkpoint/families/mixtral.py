"""Mixtral: Mistral's attention, and every MLP a choice of experts that share its size."""

from baton.checkpoint.families.biases import no_biases
from baton.checkpoint.families.experts import read_experts
from baton.checkpoint.families.family import ExpertSpec, Family
from baton.checkpoint.families.names import TensorNames
from baton.checkpoint.families.windows import same_in_all_layers_if_given
from baton.checkpoint.fields import Fields


def _experts(config: Fields, num_layers: int) -> tuple[ExpertSpec | None, ...]:
    experts = read_experts(config, "intermediate_size", normalized=True, default_chosen=2)
    return (experts,) * num_layers


MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    biases=no_biases,
    sliding_windows=same_in_all_layers_if_given,
    names=TensorNames(
        router="block_sparse_moe.gate",
        expert="block_sparse_moe.experts.{}.",
        expert_gate_up=("w1", "w3"),
        expert_down="w2",
    ),
    experts=_experts,
    default_rms_norm_eps=1e-5,
    default_theta=1_000_000.0,
)
