"""Log-probabilities of tokens: of the plain distribution, before rules and temperature."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from baton.engine.sampling.draw import best_ids
from baton.protocol.sampling import TokenLogprobs, TopLogprob


def token_logprobs(
    logprobs: Tensor, token_ids: Tensor, num_best: Sequence[int]
) -> list[TokenLogprobs]:
    """One entry per row: of ``token_ids`` (``[R]``), and of the row's ``num_best`` best.

    logprobs: ``[R, V]``, normalised. Equal ones rank by rising token id.
    """
    chosen = logprobs.gather(1, token_ids[:, None])[:, 0].tolist()
    most = max(num_best, default=0)
    if most == 0:
        return [TokenLogprobs(logprob) for logprob in chosen]
    ids = best_ids(logprobs, most)
    values, order = logprobs.gather(1, ids).sort(dim=1, descending=True, stable=True)
    found = zip(chosen, ids.gather(1, order).tolist(), values.tolist(), num_best, strict=True)
    return [
        TokenLogprobs(logprob, tuple(map(TopLogprob, best[:count], best_values[:count])))
        for logprob, best, best_values, count in found
    ]
