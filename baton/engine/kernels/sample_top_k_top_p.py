"""One draw per row: temperature, min-p, top-k, top-p, as ``engine.sampling.draw`` has them.

logits: ``[B, V]`` float32; finite, or -inf for what must not be drawn; one of a row is finite at
least. The others are ``[B]``, of any type of number. temperature: 0 takes the first of the best.
min_p: 0 keeps all, else what is lighter than ``min_p`` times the best goes. top_k: a whole number,
0 keeps all; at the edge ties go to the lower id. top_p: 1 keeps all, else the fewest heaviest of
what is left whose weight reaches ``top_p`` of it stay. uniforms, in [0, 1): the kept tokens'
cumulative weight, in the order of their ids, is inverted at it. Returns token ids, ``[B]`` int64.
Sums are float64. No row looks at another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from baton.engine.kernels.jit import AVAILABLE, jit, jit_sizes, tl

COLUMNS_PER_STEP = 4096
MIN_TEMPERATURE = 1e-30
"""Below this the best token has all the weight, and float32 would divide by zero."""
FARTHEST: Any = tl.constexpr(0x7FFFFFFF) if AVAILABLE else None
LOG2_E: Any = tl.constexpr(1.4426950408889634) if AVAILABLE else None
LEAST_WEIGHT: Any = tl.constexpr(1e-300) if AVAILABLE else None


def sample_top_k_top_p_reference(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniforms: Tensor,
) -> Tensor:
    vocab_size = logits.shape[1]
    greedy = temperature <= 0
    divisor = torch.where(greedy, 1.0, temperature.float().clamp_min(MIN_TEMPERATURE))[:, None]
    scaled = (logits - logits.amax(dim=1, keepdim=True)) / divisor
    scaled = scaled.masked_fill(scaled < min_p.float().log()[:, None], float("-inf"))
    ranked, order = scaled.sort(dim=1, descending=True, stable=True)
    limit = torch.where(top_k > 0, top_k, vocab_size).where(~greedy, 1)[:, None]
    weights = ranked.exp().double() * (torch.arange(vocab_size, device=logits.device) < limit)
    before = weights.cumsum(dim=1) - weights
    needed = top_p.double()[:, None] * weights.sum(dim=1, keepdim=True)
    kept = weights * ((top_p[:, None] >= 1) | (before < needed))
    cumulative = torch.zeros_like(kept).scatter(1, order, kept).cumsum(dim=1)
    total = cumulative[:, -1:]
    # The product may round up to the total, beyond which there is no column.
    edge = total.nextafter(torch.zeros_like(total))
    target = torch.minimum(uniforms.double()[:, None] * total, edge)
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def sample_top_k_top_p_triton(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniforms: Tensor,
) -> Tensor:
    num_rows, vocab_size = logits.shape
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return out
    _sample_kernel[(num_rows,)](
        out,
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        uniforms,
        logits.stride(0),
        MIN_TEMPERATURE,
        VOCAB=vocab_size,
        BLOCK=COLUMNS_PER_STEP,
        num_warps=16,
    )
    return out


@jit_sizes(tables=("temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "uniforms_ptr"))
def _sample_kernel(
    out_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    uniforms_ptr: tl.tensor,
    row_stride: tl.tensor,
    min_temperature: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row. The filters keep all tokens nearer than an edge distance (see ``_distances``), and
    of those at the edge the first ``num_ties`` by id. Edges are found without a sort."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    divisor = tl.where(temperature > 0, tl.maximum(temperature, min_temperature), 1.0)
    decay = LOG2_E / divisor
    best = _best_logit(row_ptr, VOCAB, BLOCK)
    min_p = tl.load(min_p_ptr + row).to(tl.float32)
    reach = tl.where(min_p > 0, -tl.log(tl.where(min_p > 0, min_p, 1.0)) * divisor, float("inf"))

    edge = tl.full((), FARTHEST, tl.int32)
    num_ties = tl.full((), 0, tl.int32)
    top_k = tl.where(temperature > 0, tl.load(top_k_ptr + row).to(tl.int32), 1)
    if (top_k > 0) & (top_k < VOCAB):
        edge, nearer = _edge(row_ptr, best, decay, reach, top_k, VOCAB, BLOCK, True)
        num_ties = top_k - nearer

    top_p = tl.load(top_p_ptr + row).to(tl.float64)
    if top_p < 1.0:
        left, _ = _weight_nearer(row_ptr, best, decay, reach, edge, VOCAB, BLOCK)
        left += num_ties.to(tl.float64) * _weights(edge, decay)
        needed = top_p * left
        nucleus, nearer = _edge(row_ptr, best, decay, reach, needed, VOCAB, BLOCK, False)
        if nucleus <= edge:
            # A weight of 0 at the edge adds nothing, however many of them stay.
            ties = tl.ceil((needed - nearer) / tl.maximum(_weights(nucleus, decay), LEAST_WEIGHT))
            ties = tl.minimum(tl.maximum(ties, 1.0), 1.0 * VOCAB).to(tl.int32)
            num_ties = tl.where(nucleus == edge, tl.minimum(num_ties, ties), ties)
            edge = nucleus

    # Rounding may have asked for a tie more than there are.
    total, all_ties = _weight_nearer(row_ptr, best, decay, reach, edge, VOCAB, BLOCK)
    num_ties = tl.minimum(num_ties, all_ties)
    total += num_ties.to(tl.float64) * _weights(edge, decay)
    target = tl.load(uniforms_ptr + row).to(tl.float64) * total
    token_id = _inverted(row_ptr, best, decay, reach, edge, num_ties, target, VOCAB, BLOCK)
    tl.store(out_ptr + row, token_id.to(tl.int64))


@jit
def _best_logit(row_ptr: tl.tensor, VOCAB: tl.constexpr, BLOCK: tl.constexpr) -> Any:
    columns = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        inside = start + columns < VOCAB
        logits = tl.load(row_ptr + start + columns, mask=inside, other=float("-inf"))
        best = tl.maximum(best, logits)
    return tl.max(best, 0)


@jit
def _distances(
    row_ptr: tl.tensor, best: tl.tensor, reach: tl.tensor, columns: tl.tensor, VOCAB: tl.constexpr
) -> Any:
    """Best logit - logit as the bits of a float32 that is not negative: as integers they have the
    same order. Tokens past ``reach``, which min-p drops, are farthest of all, and so are columns
    past the vocabulary."""
    inside = columns < VOCAB
    distances = best - tl.load(row_ptr + columns, mask=inside, other=0.0)
    return tl.where(inside & (distances <= reach), distances.to(tl.int32, bitcast=True), FARTHEST)


@jit
def _weights(distances: tl.tensor, decay: tl.tensor) -> Any:
    """exp(-distance / temperature), float64; 0 for ``FARTHEST``, whose bits are no number."""
    reals = tl.where(distances == FARTHEST, 0, distances).to(tl.float32, bitcast=True)
    return tl.where(distances == FARTHEST, 0.0, tl.exp2(-reals * decay)).to(tl.float64)


@jit
def _weight_nearer(
    row_ptr: tl.tensor,
    best: tl.tensor,
    decay: tl.tensor,
    reach: tl.tensor,
    edge: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
) -> Any:
    """The weight of all tokens nearer than ``edge``, and how many lie just there."""
    columns = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    ties = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, VOCAB, BLOCK):
        distances = _distances(row_ptr, best, reach, start + columns, VOCAB)
        weights = _weights(distances, decay)
        total += tl.where(distances < edge, weights, 0.0)
        ties += (distances == edge).to(tl.int32)
    return tl.sum(total, 0), tl.sum(ties, 0)


@jit
def _edge(
    row_ptr: tl.tensor,
    best: tl.tensor,
    decay: tl.tensor,
    reach: tl.tensor,
    needed: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
) -> Any:
    """The distance at which the tokens, from the nearest on, come to ``needed`` (a weight; with
    COUNT a number of tokens), and what the nearer ones come to.

    It is the greatest distance such that all nearer ones together stay below ``needed``: two bits
    of it are settled in one pass over the row, from the highest on.
    """
    AMOUNT: tl.constexpr = tl.int32 if COUNT else tl.float64
    columns = tl.arange(0, BLOCK)
    edge = tl.full((), 0, tl.int64)
    nearer = tl.full((), 0, AMOUNT)
    for step in range(16):
        # 64 bits, because the first digit's bounds go past 31; FARTHEST counts what they do.
        digit = tl.full((), 1, tl.int64) << (30 - 2 * step)
        bound1 = tl.minimum(edge + digit, FARTHEST).to(tl.int32)
        bound2 = tl.minimum(edge + 2 * digit, FARTHEST).to(tl.int32)
        bound3 = tl.minimum(edge + 3 * digit, FARTHEST).to(tl.int32)
        sum1 = tl.zeros((BLOCK,), AMOUNT)
        sum2 = tl.zeros((BLOCK,), AMOUNT)
        sum3 = tl.zeros((BLOCK,), AMOUNT)
        for start in range(0, VOCAB, BLOCK):
            distances = _distances(row_ptr, best, reach, start + columns, VOCAB)
            amounts = (distances < FARTHEST).to(tl.int32) if COUNT else _weights(distances, decay)
            sum1 += tl.where(distances < bound1, amounts, 0)
            sum2 += tl.where(distances < bound2, amounts, 0)
            sum3 += tl.where(distances < bound3, amounts, 0)
        below1, below2, below3 = tl.sum(sum1, 0), tl.sum(sum2, 0), tl.sum(sum3, 0)
        if below3 < needed:
            edge, nearer = bound3.to(tl.int64), below3
        elif below2 < needed:
            edge, nearer = bound2.to(tl.int64), below2
        elif below1 < needed:
            edge, nearer = bound1.to(tl.int64), below1
    return edge.to(tl.int32), nearer


@jit
def _inverted(
    row_ptr: tl.tensor,
    best: tl.tensor,
    decay: tl.tensor,
    reach: tl.tensor,
    edge: tl.tensor,
    num_ties: tl.tensor,
    target: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
) -> Any:
    """The first kept token, by id, at which the running weight exceeds ``target``; the last kept
    one when rounding leaves none."""
    columns = tl.arange(0, BLOCK)
    found = tl.full((), VOCAB, tl.int32)
    last = tl.full((), 0, tl.int32)
    running = tl.full((), 0.0, tl.float64)
    ties_seen = tl.full((), 0, tl.int32)
    for start in range(0, VOCAB, BLOCK):
        ids = start + columns
        distances = _distances(row_ptr, best, reach, ids, VOCAB)
        weights = _weights(distances, decay)
        at_edge = (distances == edge).to(tl.int32)
        tie_rank = ties_seen + tl.cumsum(at_edge, 0)
        kept = (distances < edge) | ((distances == edge) & (tie_rank <= num_ties))
        kept = kept & (weights > 0.0)
        weights = tl.where(kept, weights, 0.0)
        cumulative = running + tl.cumsum(weights, 0)
        hit = kept & (cumulative > target)
        found = tl.minimum(found, tl.min(tl.where(hit, ids, VOCAB), 0))
        last = tl.maximum(last, tl.max(tl.where(kept, ids, 0), 0))
        running += tl.sum(weights, 0)
        ties_seen += tl.sum(at_edge, 0)
    return tl.where(found < VOCAB, found, last)
