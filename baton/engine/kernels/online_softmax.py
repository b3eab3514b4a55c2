"""The steps that every attention kernel shares: scaled scores, and a softmax that sees its row
tile by tile. Scores are in units of log2, because the hardware's exponential is ``exp2``.
"""

from __future__ import annotations

import math
from typing import Any

from baton.engine.kernels.jit import jit, tl

LOG2_E = math.log2(math.e)


def score_factors(scale: float, soft_cap: float | None) -> tuple[float, float]:
    """(inner, outer) for ``scores_log2``."""
    if soft_cap is None:
        return 0.0, scale * LOG2_E
    return 2.0 * LOG2_E * scale / soft_cap, soft_cap * LOG2_E


@jit
def scores_log2(
    products: tl.tensor, inner: tl.tensor, outer: tl.tensor, HAS_CAP: tl.constexpr
) -> Any:
    """``q . k`` -> score * log2(e). With a cap, tanh(z) = 1 - 2 / (exp(2 z) + 1)."""
    if HAS_CAP:
        products = 1.0 - 2.0 / (tl.exp2(products * inner) + 1.0)
    return products * outer


@jit
def softmax_step(
    scores: tl.tensor, row_max: tl.tensor, row_sum: tl.tensor, MAY_BE_EMPTY: tl.constexpr
) -> Any:
    """Fold a tile ``[M, N]`` into ``[M]`` maxima and sums.

    Returns (weights, factor of what was accumulated so far, maxima, sums). MAY_BE_EMPTY: a row
    may have seen nothing yet; its maximum stays -inf, and -inf minus -inf must not be formed.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    base = new_max
    if MAY_BE_EMPTY:
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - base[:, None])
    factor = tl.exp2(row_max - base)
    return weights, factor, new_max, row_sum * factor + tl.sum(weights, 1)
