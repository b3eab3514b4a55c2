"""An MLP that is a choice of experts: rows are grouped by expert, so each runs one product.

Shapes: T rows, E experts, k chosen per row, h hidden, I inner.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from baton.engine.kernels.registry import kernels_for
from baton.engine.models.parameters import Experts


def choose(rows: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
    """Weights float32 and expert numbers int64, both ``[T, k]``, by falling probability."""
    probabilities = linear(rows, experts.router).float().softmax(dim=-1)
    weights, chosen = probabilities.topk(experts.num_chosen, dim=-1)
    if experts.normalized:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, chosen


def mix_experts(rows: Tensor, experts: Experts, gated: Callable[[Tensor], Tensor]) -> Tensor:
    """rows: ``[T, h]``, returned likewise. gated: ``[N, 2 * I] -> [N, I]``, the activation.

    What the other rows chose decides only where a row stands among those of its experts; its
    own k results are added in the order of its own choice.
    """
    weights, chosen = choose(rows, experts)
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    expert_of_row = flat[order].to(torch.int32)
    grouped = rows.index_select(0, order // experts.num_chosen)
    grouped_matmul = kernels_for(rows.device).grouped_matmul
    inner = gated(grouped_matmul(grouped, experts.gate_up, expert_of_row))
    out = grouped_matmul(inner, experts.down, expert_of_row)
    by_choice = torch.empty_like(out).index_copy_(0, order, out)
    by_choice = by_choice.view(len(rows), experts.num_chosen, -1)
    return (by_choice * weights[..., None]).sum(dim=1).to(rows.dtype)
