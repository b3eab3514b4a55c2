"""From logits to tokens: greedy, or temperature, min-p, top-k, top-p, then one draw.

The order is vLLM's: what min-p and top-k drop no longer counts in top-p's mass.

The draw inverts the cumulative distribution at one uniform number keyed by (seed, position),
with the kept tokens in the order of their ids. Why not Gumbel noise per token: that takes a
random number per vocabulary entry instead of one. Why order by id and not by probability: two
tokens of nearly equal probability may swap ranks when another batch shape rounds differently,
and a cumulative sum in id order does not notice.

No row looks at another row, so a request's draw does not depend on its batch.
Shapes: S rows to sample, V vocabulary, m candidates of a row. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baton.engine.philox import uniforms
from baton.protocol.sampling import SamplingParams

NUCLEUS_CANDIDATES = 256
"""Top-p without top-k first looks at so many tokens, and at eight times as many until they hold
enough: sorting a whole vocabulary costs far more than a few selections from it."""
NUCLEUS_GROWTH = 8
MIN_TEMPERATURE = 1e-30
"""Below this the best token has all the weight, and float32 would divide by zero."""


def draw_tokens(
    logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> Tensor:
    """Token ids ``[S]``. logits: ``[S, V]`` float32; positions: of the drawn tokens.

    A logit is finite, or -inf for what must not be drawn; a row has one finite at least.
    Temperature 0 takes the first of the best. Equal logits rank by rising token id.
    """
    token_ids = logits.argmax(dim=-1)
    drawn = [i for i, p in enumerate(params) if p.temperature > 0]
    if not drawn:
        return token_ids
    vocab_size = logits.shape[1]
    by_rank = [i for i in drawn if 0 < params[i].top_k < vocab_size]
    unranked = [i for i in drawn if not 0 < params[i].top_k < vocab_size]
    by_mass = [i for i in unranked if params[i].top_p < 1]
    plain = [i for i in unranked if params[i].top_p >= 1]
    uniform = uniforms([p.seed for p in params], positions)

    def pick(rows: Sequence[int], weights: Tensor, ids: Tensor | None) -> None:
        chosen = _invert(weights, torch.from_numpy(uniform[list(rows)]).to(logits.device))
        token_ids[list(rows)] = (chosen if ids is None else ids.gather(1, chosen))[:, 0]

    if plain:
        pick(plain, _scaled(logits, params, plain).exp(), None)
    if by_rank:
        scaled = _scaled(logits, params, by_rank)
        ids = best_ids(scaled, max(params[i].top_k for i in by_rank))
        pick(by_rank, _kept_by_rank(scaled.gather(1, ids), params, by_rank), ids)
    num_candidates = min(vocab_size, NUCLEUS_CANDIDATES)
    while by_mass:
        scaled = _scaled(logits, params, by_mass)
        ids = best_ids(scaled, num_candidates)
        total = scaled.exp().sum(dim=1, keepdim=True, dtype=torch.float64)
        top_p = _column([params[i].top_p for i in by_mass], total)
        weights = scaled.gather(1, ids).exp().double()
        enough = (weights.sum(dim=1) >= (top_p * total)[:, 0]).tolist()
        enough = [ok or num_candidates == vocab_size for ok in enough]
        done = [n for n, ok in enumerate(enough) if ok]
        if done:
            kept = _nucleus(weights[done], top_p[done] * total[done])
            pick([by_mass[n] for n in done], kept, ids[done])
        by_mass = [i for i, ok in zip(by_mass, enough, strict=True) if not ok]
        num_candidates = min(vocab_size, num_candidates * NUCLEUS_GROWTH)
    return token_ids


def best_ids(values: Tensor, count: int) -> Tensor:
    """Ids of each row's ``count`` largest values, in rising id order: ``[rows, count]``.

    Ties at the edge go to the lower id. ``topk`` alone leaves them to chance.
    """
    num_rows, vocab_size = values.shape
    count = min(count, vocab_size)
    if count == vocab_size:
        return torch.arange(vocab_size, device=values.device).expand(num_rows, -1)
    edge = values.topk(count, dim=1).values[:, -1:]
    above = values > edge
    tied = values == edge
    room = count - above.sum(dim=1, keepdim=True)
    kept = above | (tied & (tied.cumsum(dim=1) <= room))
    return kept.nonzero()[:, 1].view(num_rows, count)


def _scaled(logits: Tensor, params: Sequence[SamplingParams], rows: Sequence[int]) -> Tensor:
    """Log-weights ``[R, V]`` float32, 0 for the best: no temperature makes them overflow.

    -inf for what min-p drops.
    """
    picked = logits[list(rows)]
    temperature = _column([max(params[i].temperature, MIN_TEMPERATURE) for i in rows], picked)
    scaled = (picked - picked.amax(dim=1, keepdim=True)) / temperature
    if any(params[i].min_p > 0 for i in rows):
        # The best token's log-weight is 0, so min-p is a bound that is the same for every row.
        bound = _column([params[i].min_p for i in rows], scaled).log()
        scaled.masked_fill_(scaled < bound, float("-inf"))
    return scaled


def _kept_by_rank(
    candidates: Tensor, params: Sequence[SamplingParams], rows: Sequence[int]
) -> Tensor:
    """Weights ``[R, m]`` after top-k, then top-p of what top-k left; 0 for what is dropped."""
    rank = candidates.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    top_k = torch.tensor([params[i].top_k for i in rows], device=rank.device)[:, None]
    weights = candidates.exp().double() * (rank < top_k)
    top_p = _column([params[i].top_p for i in rows], weights)
    filtered = _nucleus(weights, top_p * weights.sum(dim=1, keepdim=True))
    return torch.where(top_p < 1, filtered, weights)


def _nucleus(weights: Tensor, needed: Tensor) -> Tensor:
    """Zero all but the fewest heaviest whose sum reaches ``needed``; at least one stays."""
    ordered, order = weights.sort(dim=1, descending=True, stable=True)
    before = ordered.cumsum(dim=1) - ordered
    return torch.zeros_like(weights).scatter(1, order, ordered * (before < needed))


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Column ``[R, 1]`` where the running sum first exceeds uniform x total: weight 0 never is."""
    cumulative = weights.cumsum(dim=1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # The product may round up to the total, beyond which there is no column.
    target = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
