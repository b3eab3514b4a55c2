"""Top-k and top-p without sorting a vocabulary.

Log-weights go into bins of a fixed width, a sum over bins finds the one in which the limit falls,
and only that bin's few tokens are sorted. All is one pass over the row, whatever its shape: flat
distributions cost what steep ones do.

Shapes: R rows, V vocabulary. Equal weights rank by rising token id. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BINS_PER_NAT = 128
MAX_BINS = 4_096
"""32 nats below the best token, and all that is less likely in the last bin."""


def num_bins(vocab_size: int) -> int:
    return min(MAX_BINS, vocab_size)


def bins_of(scaled: Tensor) -> Tensor:
    """int64 ``[R, V]``. scaled: log-weights, 0 for the best, -inf for what is out already."""
    return (scaled * -BINS_PER_NAT).clamp_(max=num_bins(scaled.shape[1]) - 1).long()


def keep_top_k(weights: Tensor, scaled: Tensor, bins: Tensor, top_k: Tensor) -> None:
    """Zero all but the ``top_k`` (int64 ``[R, 1]``, 1 to V) heaviest, in place."""
    counts = _zeros(bins, torch.int64)
    counts.scatter_add_(1, bins, torch.ones_like(bins[:1, :1]).expand_as(bins))
    edge, above = _edge(counts, top_k)
    _cut(
        weights,
        scaled,
        bins,
        edge,
        lambda inside: torch.arange(inside.shape[1], device=bins.device) < top_k - above,
    )


def keep_top_p(weights: Tensor, scaled: Tensor, bins: Tensor, top_p: Tensor) -> None:
    """Zero all but the fewest heaviest whose sum reaches ``top_p`` (float64 ``[R, 1]``) of the
    whole, in place; at least one stays."""
    masses = _zeros(bins, torch.float64)
    masses.scatter_add_(1, bins, weights.double())
    needed = top_p * masses.cumsum(dim=1)[:, -1:]
    edge, above = _edge(masses, needed)

    def reach(inside: Tensor) -> Tensor:
        before = above + inside.cumsum(dim=1) - inside
        return before < needed

    _cut(weights, scaled, bins, edge, reach)


def _zeros(bins: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(len(bins), num_bins(bins.shape[1]), dtype=dtype, device=bins.device)


def _edge(amounts: Tensor, needed: Tensor) -> tuple[Tensor, Tensor]:
    """(first bin with which the sum reaches ``needed``, the sum before it), each ``[R, 1]``."""
    sums = torch.nn.functional.pad(amounts.cumsum(dim=1), (1, 0))
    edge = torch.searchsorted(sums[:, 1:].contiguous(), needed).clamp_(max=amounts.shape[1] - 1)
    return edge, sums.gather(1, edge)


def _cut(
    weights: Tensor,
    scaled: Tensor,
    bins: Tensor,
    edge: Tensor,
    kept: Callable[[Tensor], Tensor],
) -> None:
    """Zero what lies behind the edge bin, and of its own tokens those that are not ``kept``.

    kept: from the bin's weights, heaviest first (``[R, m]`` float64), to which stay.
    """
    rows, ids = ((bins == edge) & (weights > 0)).nonzero(as_tuple=True)
    num_inside = torch.bincount(rows, minlength=len(bins))
    first = num_inside.cumsum(0) - num_inside
    column = torch.arange(len(rows), device=rows.device) - first[rows]
    shape = (len(bins), max(1, int(num_inside.max())))
    values = torch.full(shape, float("-inf"), device=bins.device)
    values[rows, column] = scaled[rows, ids]
    inside = torch.zeros(shape, dtype=torch.float64, device=bins.device)
    inside[rows, column] = weights[rows, ids].double()
    order = values.argsort(dim=1, descending=True, stable=True)
    stays = torch.zeros(shape, dtype=torch.bool, device=bins.device)
    stays.scatter_(1, order, kept(inside.gather(1, order)).expand(shape))
    out = ~stays[rows, column]
    weights.masked_fill_(bins > edge, 0)
    weights[rows[out], ids[out]] = 0
