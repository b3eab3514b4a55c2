"""The fields of a choice of experts, as the families write them down."""

from __future__ import annotations

from baton.checkpoint.families.family import ExpertSpec
from baton.checkpoint.fields import Fields

MAX_EXPERTS = 4_096
MAX_EXPERT_SIZE = 2**20


def read_experts(
    config: Fields, size_field: str, *, normalized: bool, default_chosen: int
) -> ExpertSpec:
    """The number of experts has two spellings: ``num_local_experts`` and ``num_experts``."""
    count = "num_local_experts" if config.has("num_local_experts") else "num_experts"
    num_experts = config.integer(count, 1, MAX_EXPERTS)
    return ExpertSpec(
        num_experts=num_experts,
        num_chosen=config.integer("num_experts_per_tok", 1, num_experts, default=default_chosen),
        intermediate_size=config.integer(size_field, 1, MAX_EXPERT_SIZE),
        normalized=normalized,
    )
