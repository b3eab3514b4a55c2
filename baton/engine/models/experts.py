"""An MLP that is a choice of experts: rows are grouped by expert, so each runs one product.

Shapes: T rows, E experts, k chosen per row, h hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.engine.models.model import ExpertMlp


def choose(rows: Tensor, mlp: ExpertMlp) -> tuple[Tensor, Tensor]:
    """Weights float32 and expert numbers int64, both ``[T, k]``, by falling probability."""
    probabilities = mlp.router(rows).float().softmax(dim=-1)
    weights, chosen = probabilities.topk(mlp.num_chosen, dim=-1)
    if mlp.normalized:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, chosen


def mix_experts(rows: Tensor, mlp: ExpertMlp) -> Tensor:
    """rows: ``[T, h]``, returned likewise.

    What the other rows chose decides only where a row stands among those of its experts; its
    own k results are added in the order of its own choice.
    """
    weights, chosen = choose(rows, mlp)
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    expert_of_row = flat[order].to(torch.int32)
    grouped = rows.index_select(0, order // mlp.num_chosen)
    out = mlp.down(mlp.gate_up(grouped, expert_of_row), expert_of_row)
    by_choice = torch.empty_like(out).index_copy_(0, order, out)
    by_choice = by_choice.view(len(rows), mlp.num_chosen, -1)
    return (by_choice * weights[..., None]).sum(dim=1).to(rows.dtype)
