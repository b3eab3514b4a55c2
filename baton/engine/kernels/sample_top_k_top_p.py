"""One draw per row: temperature, then top-k, then top-p, then min-p, as ``engine.sampler`` has it.

logits: ``[B, V]`` float32, finite. temperature: ``[B]`` float32; 0 takes the first of the best.
top_k: ``[B]`` int32, 0 keeps all; at the edge ties go to the lower id. top_p: ``[B]``; 1 keeps
all, else the fewest heaviest of what top-k left whose weight reaches ``top_p`` of it. min_p:
``[B]``; 0 keeps all, else what is lighter than ``min_p`` times the best goes. uniforms: ``[B]`` in
[0, 1): the kept tokens' cumulative weight, in the order of their ids, is inverted at it.
Returns token ids, ``[B]`` int64. Sums are float64. No row looks at another.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_TEMPERATURE = 1e-30
"""Below this the best token has all the weight, and float32 would divide by zero."""


def sample_top_k_top_p_reference(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniforms: Tensor,
) -> Tensor:
    vocab_size = logits.shape[1]
    ranked, order = logits.sort(dim=1, descending=True, stable=True)
    divisor = temperature.float().clamp_min(MIN_TEMPERATURE)[:, None]
    weights = ((ranked - ranked[:, :1]) / divisor).exp().double()
    limit = torch.where(top_k > 0, top_k, vocab_size)
    limit = torch.where(temperature > 0, limit, 1)[:, None]
    weights = weights * (torch.arange(vocab_size, device=logits.device) < limit)
    before = weights.cumsum(dim=1) - weights
    needed = top_p.double()[:, None] * weights.sum(dim=1, keepdim=True)
    in_nucleus = (top_p[:, None] >= 1) | (before < needed)
    kept = weights * (in_nucleus & (weights >= min_p.double()[:, None]))
    cumulative = torch.zeros_like(kept).scatter(1, order, kept).cumsum(dim=1)
    total = cumulative[:, -1:]
    # The product may round up to the total, beyond which there is no column.
    edge = total.nextafter(torch.zeros_like(total))
    target = torch.minimum(uniforms.double()[:, None] * total, edge)
    return torch.searchsorted(cumulative, target, right=True)[:, 0]
