"""The lookups of all sequences that may be drafted: what they hold in all, what a step takes in.

Pure. Prompts are long and many: a lookup comes to its sequence over several steps, so that none
is late, and all of them together stay within ``MAX_TOKENS_IN_ALL``.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.engine.prompt_lookup import PromptLookup
from baton.engine.sequence import Sequence

MAX_TOKENS_EACH = 65_536
"""Of one sequence; then its oldest go."""
MAX_TOKENS_IN_ALL = 524_288
"""Some 150 MB. Who came too late for a lookup has none until others leave: were the longest
unused to go instead, a batch of too many would build lookups all the time and use none."""
MAX_TOKENS_PER_STEP = 4_096
MIN_TOKENS_PER_STEP = 16
"""For each sequence, whatever others take in: it need not miss its drafts because of them."""


@dataclass(slots=True)
class _Kept:
    lookup: PromptLookup
    room: int
    """Tokens that it may hold."""


class Lookups:
    """One that is asked for in each step stays up to date. What is forgotten is built again."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}
        self._num_granted = 0
        """The sum of their rooms."""
        self._num_left = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_tokens(self) -> int:
        return sum(len(kept.lookup) for kept in self._kept.values())

    def begin_step(self) -> None:
        self._num_left = MAX_TOKENS_PER_STEP

    def up_to_date(self, sequence: Sequence) -> PromptLookup | None:
        """None while there is no room for it, or more to take in than this step may."""
        kept = self._kept.get(sequence.seq_id) or self._begin(sequence)
        if kept is None:
            return None
        kept.room += self._grant(min(sequence.num_tokens, MAX_TOKENS_EACH) - kept.room)
        lookup = kept.lookup
        start = lookup.num_seen
        most = max(self._num_left, MIN_TOKENS_PER_STEP)
        token_ids = sequence.tokens(start, min(sequence.num_tokens, start + most))
        self._num_left -= len(token_ids)
        lookup.extend(token_ids)
        if len(lookup) > kept.room:
            lookup.forget(len(lookup) - kept.room)
        return lookup if lookup.num_seen == sequence.num_tokens else None

    def forget(self, seq_id: str) -> None:
        kept = self._kept.pop(seq_id, None)
        if kept is not None:
            self._num_granted -= kept.room

    def _begin(self, sequence: Sequence) -> _Kept | None:
        wanted = min(sequence.num_tokens, MAX_TOKENS_EACH)
        if wanted > MAX_TOKENS_IN_ALL - self._num_granted:
            return None
        kept = _Kept(PromptLookup(sequence.num_tokens - wanted), self._grant(wanted))
        self._kept[sequence.seq_id] = kept
        return kept

    def _grant(self, wanted: int) -> int:
        granted = max(0, min(wanted, MAX_TOKENS_IN_ALL - self._num_granted))
        self._num_granted += granted
        return granted
