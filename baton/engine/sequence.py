"""A sequence inside one worker's engine, and what a step tells about it. Pure data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from baton.protocol.block_hash import EXACT, BlockKey, block_key, root_key
from baton.protocol.sampling import SamplingParams, TokenLogprobs

FinishReason = Literal["", "stop", "length"]

PRIORITY_ARRIVALS = 8_192
"""A level of priority is worth so many arrivals: a sequence is passed by at most so many later
ones of the next better level, so that strict priority starves nobody."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One attempt at one request. ``prompt_ids`` never change; ``output_ids`` grow.

    priority: the lower runs first (vLLM's convention); equal ones in order of arrival.
    tenant: whose prompts may share KV with this one. accepts: quality classes of cached KV that
    it may use, the best first; quality: the class of the KV that it has.
    """

    seq_id: str
    prompt_ids: tuple[int, ...]
    output_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    order: int = 0
    block_table: tuple[int, ...] = ()
    num_computed: int = 0
    num_chunks: int = 0
    num_preemptions: int = 0
    is_dropped: bool = False
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Of the prompt tokens behind the first, as far as computed; None when nobody asked. A
    sequence that asks must compute its whole prompt: no cached prefix has them."""
    tenant: str = ""
    urgency: int = 0
    """The lowest runs first; set on arrival."""
    num_cached: int = 0
    """Tokens that the last admission found in the prefix cache."""
    num_named: int = 0
    """Leading blocks that are full and have been offered to the prefix cache."""
    complete_from: int = 0
    """Rows of earlier positions came from elsewhere, and not for layers that slide past them:
    they serve this sequence and no other."""
    host_blocks: tuple[int, ...] = ()
    """Where its computed KV is while it is swapped out."""
    grammar: object = None
    """Its constraint as compiled: held, so that no step must compile it again."""
    accepts: tuple[str, ...] = (EXACT,)
    quality: str = EXACT
    _keys: dict[str, list[BlockKey]] = field(default_factory=dict)
    """By quality class."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        cut = len(self.prompt_ids)
        if stop <= cut:
            return self.prompt_ids[start:stop]
        return self.prompt_ids[start:cut] + tuple(self.output_ids[max(0, start - cut) : stop - cut])

    def arrived(self, order: int) -> None:
        self.order = order
        self.urgency = order + self.priority * PRIORITY_ARRIVALS

    def keys(self, count: int, block_size: int, quality: str = "") -> list[BlockKey]:
        """Keys of at least the first ``count`` blocks, all of them full by the known tokens, as of
        that quality class; of its own where none is given."""
        quality = quality or self.quality
        keys = self._keys.get(quality)
        if keys is None:
            keys = self._keys[quality] = []
        while len(keys) < count:
            parent = keys[-1] if keys else root_key(self.tenant, quality)
            start = len(keys) * block_size
            keys.append(block_key(parent, self.tokens(start, start + block_size)))
        return keys


class NewToken(msgspec.Struct, frozen=True, gc=False):
    """A token drawn for a sequence, and whether it was the last one."""

    sequence: Sequence
    token_id: int
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason
    stop_token_id: int
    """-1 unless one of the request's own stop_token_ids ended it."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """With a sequence's first token, when it asked for them."""
    place: int = 0
    """In the sequence's output, from 0: a step may bring several."""


def finish(
    sequence: Sequence, token_id: int, eos_token_ids: frozenset[int]
) -> tuple[FinishReason, int]:
    """Whether ``token_id``, its newest, is its last: (reason, the stop token or -1)."""
    sampling = sequence.sampling
    if token_id in sampling.stop_token_ids:
        return "stop", token_id
    if token_id in eos_token_ids and not sampling.ignore_eos:
        return "stop", -1
    if len(sequence.output_ids) >= sampling.max_tokens:
        return "length", -1
    return "", -1


@dataclass(frozen=True, slots=True)
class SchedulerCounts:
    num_preemptions: int
    num_blocked: int
    """Steps at which the most urgent waiting sequence did not fit into the free blocks."""
    num_swapped_out: int
    """Of the preemptions, those whose KV went to host memory."""
    num_cache_queried_tokens: int
    """Tokens of admitted sequences that were looked up in the prefix cache."""
    num_cache_hit_tokens: int
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
