"""Each row times the matrix of its expert: the products of a mixture of experts.

x: ``[T, h]``. weights: ``[E, out, h]``, contiguous. expert_of_row: ``[T]`` int32, ascending, so
that an expert's rows lie together; an expert may have none. Returns ``[T, out]`` in x's dtype:
``x[t] @ weights[expert_of_row[t]].T``, accumulated in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_matmul_reference(x: Tensor, weights: Tensor, expert_of_row: Tensor) -> Tensor:
    out = x.new_empty(len(x), weights.shape[1])
    counts = torch.bincount(expert_of_row.long(), minlength=len(weights)).tolist()
    first = 0
    for expert, count in enumerate(counts):
        rows = slice(first, first + count)
        first += count
        if count:
            out[rows] = (x[rows].float() @ weights[expert].float().T).to(x.dtype)
    return out
