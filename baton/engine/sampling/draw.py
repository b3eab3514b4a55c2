"""From logits to tokens: greedy, or temperature, min-p, top-k, top-p, then one draw.

The order is vLLM's: what min-p and top-k drop no longer counts in top-p's mass.

The draw inverts the cumulative distribution at one uniform number keyed by (seed, position),
with the kept tokens in the order of their ids. Why not Gumbel noise per token: that takes a
random number per vocabulary entry instead of one. Why order by id and not by probability: two
tokens of nearly equal probability may swap ranks when another batch shape rounds differently,
and a cumulative sum in id order does not notice.

No row looks at another row, so a request's draw does not depend on its batch.
Shapes: S rows to sample, R rows of one kind, V vocabulary. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from baton.engine.philox import uniforms
from baton.engine.sampling.filters import bins_of, keep_top_k, keep_top_p
from baton.protocol.sampling import SamplingParams

MIN_TEMPERATURE = 1e-30
"""Below this the best token has all the weight, and float32 would divide by zero."""
MAX_ELEMENTS = 4 * 2**20
"""Of one pass: more rows would only need more memory."""
MAX_RANKED = 1_024
"""A top-k up to here is found by selection, a larger one by bins."""
BLOCK = 128
"""A draw sums blocks of so many tokens, and looks into one of them."""


def draw_tokens(
    logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> Tensor:
    """Token ids ``[S]``. logits: ``[S, V]`` float32; positions: of the drawn tokens.

    A logit is finite, or -inf for what must not be drawn; a row has one finite at least.
    Temperature 0 takes the first of the best. Equal logits rank by rising token id.
    """
    drawn = [i for i, p in enumerate(params) if p.temperature > 0]
    if not drawn:
        return logits.argmax(dim=-1)
    uniform = torch.from_numpy(uniforms([p.seed for p in params], positions)).to(logits.device)
    all_greedy = len(drawn) < len(params)
    token_ids = logits.argmax(dim=-1) if all_greedy else uniform.new_empty(len(params)).long()
    for rows in _slabs(params, drawn, logits.shape[1]):
        scaled = _scaled(logits, [params[i] for i in rows], rows)
        token_ids[rows] = _pick(scaled, [params[i] for i in rows], uniform[rows])
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
    kept = values >= edge
    if int(kept.sum()) > num_rows * count:
        above = values > edge
        tied = kept & ~above
        room = count - above.sum(dim=1, keepdim=True)
        kept = above | (tied & (tied.cumsum(dim=1) <= room))
    return kept.nonzero()[:, 1].view(num_rows, count)


def invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Ids ``[R]`` at which the running sum of ``weights`` (``[R, V]``) first exceeds ``uniform``
    (float64 ``[R]``, in [0, 1)) times the total. A token of weight 0 never is one."""
    vocab_size = weights.shape[1]
    whole = vocab_size // BLOCK * BLOCK
    sums = weights[:, :whole].view(len(weights), -1, BLOCK).sum(dim=2, dtype=torch.float64)
    if whole < vocab_size:
        tail = weights[:, whole:].sum(dim=1, keepdim=True, dtype=torch.float64)
        sums = torch.cat([sums, tail], dim=1)
    total = torch.nn.functional.pad(sums.cumsum(dim=1), (1, 0))
    end = total[:, -1:]
    # The product may round up to the total, beyond which there is no token.
    target = torch.minimum(uniform[:, None] * end, end.nextafter(torch.zeros_like(end)))
    block = torch.searchsorted(total[:, 1:].contiguous(), target, right=True)
    ids = (block * BLOCK + torch.arange(BLOCK, device=weights.device)).clamp_(max=vocab_size - 1)
    inside = weights.gather(1, ids).double()
    # Ids past the vocabulary's end repeat its last token: they must not weigh again.
    inside[:, 1:].masked_fill_(ids[:, 1:] == ids[:, :-1], 0)
    running = inside.cumsum(dim=1) + total.gather(1, block)
    place = torch.searchsorted(running, target, right=True)
    # Summed in another order a block may end just short of the target: its last token then.
    last = BLOCK - 1 - (inside > 0).flip(1).long().argmax(dim=1, keepdim=True)
    return ids.gather(1, torch.minimum(place, last))[:, 0]


def _slabs(
    params: Sequence[SamplingParams], drawn: Sequence[int], vocab_size: int
) -> Iterator[list[int]]:
    """Rows that need the same filters, so many at a time."""
    alike: dict[tuple[bool, bool, bool], list[int]] = {}
    for i in drawn:
        top_k = params[i].top_k
        kind = (0 < top_k < vocab_size, top_k > MAX_RANKED, params[i].top_p < 1)
        alike.setdefault(kind, []).append(i)
    size = max(1, MAX_ELEMENTS // vocab_size)
    for rows in alike.values():
        for first in range(0, len(rows), size):
            yield rows[first : first + size]


def _pick(scaled: Tensor, params: Sequence[SamplingParams], uniform: Tensor) -> Tensor:
    """Ids ``[R]``. A small top-k is taken out first, so that the rest looks at few tokens."""
    most = max(p.top_k for p in params)
    if not 0 < most <= min(MAX_RANKED, scaled.shape[1] - 1):
        return invert(_weights(scaled, params), uniform)
    ids = best_ids(scaled, most)
    chosen = invert(_weights(scaled.gather(1, ids), params), uniform)
    return ids.gather(1, chosen[:, None])[:, 0]


def _weights(scaled: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """float32 ``[R, V]``, 1 for the best token, 0 for what the filters drop."""
    weights = scaled.exp()
    has_top_k = any(0 < p.top_k < scaled.shape[1] for p in params)
    has_top_p = params[0].top_p < 1
    if has_top_k or has_top_p:
        bins = bins_of(scaled)
        if has_top_k:
            most = scaled.shape[1]
            top_k = torch.tensor([min(p.top_k, most) for p in params], device=scaled.device)
            keep_top_k(weights, scaled, bins, top_k[:, None])
        if has_top_p:
            top_p = [p.top_p for p in params]
            like = weights.new_tensor(top_p, dtype=torch.float64)
            keep_top_p(weights, scaled, bins, like[:, None])
    return weights


def _scaled(logits: Tensor, params: Sequence[SamplingParams], rows: Sequence[int]) -> Tensor:
    """Log-weights ``[R, V]`` float32, 0 for the best: no temperature makes them overflow.

    -inf for what min-p drops.
    """
    picked = logits if len(rows) == len(logits) else logits[list(rows)]
    scaled = picked - picked.amax(dim=1, keepdim=True)
    if any(p.temperature != 1 for p in params):
        scaled /= _column([max(p.temperature, MIN_TEMPERATURE) for p in params], scaled)
    if any(p.min_p > 0 for p in params):
        # The best token's log-weight is 0, so min-p is a bound that is the same for every row.
        bound = _column([p.min_p for p in params], scaled).log()
        scaled.masked_fill_(scaled < bound, float("-inf"))
    return scaled


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
