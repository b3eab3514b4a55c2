"""Guesses how a sequence goes on from what it has said before: no draft model. Pure.

The last few tokens are looked for among earlier ones of prompt and output; what followed there,
at its latest occurrence, is the draft. Answers that quote, edit or repeat are guessed well
(prompt lookup; CopySpec, arXiv 2502.08923). O(1) and some 300 bytes for
each token that is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MATCH_TOKENS = (5, 3)
"""Lengths of ends that are looked for, the longest first: a longer match guesses better."""
_TOKEN_BITS = 32
"""Runs are packed into one integer each: smaller than tuples, and no work for the collector."""


class PromptLookup:
    """The newest tokens of one sequence, as far as ``extend`` has brought them.

    num_seen: tokens of the sequence so far, those before ``start`` and those forgotten included.
    """

    def __init__(self, start: int = 0) -> None:
        self.num_seen = start
        self._first = start
        """The place in the sequence of ``_tokens[_num_dead]``, the oldest that is not forgotten."""
        self._num_dead = 0
        self._tokens: list[int] = []
        self._behind: tuple[dict[int, int], ...] = tuple({} for _ in MATCH_TOKENS)
        """Per length: the place where the latest occurrence of a packed run goes on."""
        self._ends = [0] * len(MATCH_TOKENS)
        """The packed runs at the end."""

    def __len__(self) -> int:
        """Tokens that are looked at."""
        return len(self._tokens) - self._num_dead

    def extend(self, token_ids: Sequence[int]) -> None:
        for number, (length, behind) in enumerate(zip(MATCH_TOKENS, self._behind, strict=True)):
            end, mask = self._ends[number], _mask(length)
            whole_from = self._first + length
            for place, token_id in enumerate(token_ids, self.num_seen):
                if place >= whole_from:
                    behind[end] = place
                end = (end << _TOKEN_BITS | token_id) & mask
            self._ends[number] = end
        self._tokens += token_ids
        self.num_seen += len(token_ids)

    def forget(self, count: int) -> None:
        """The oldest ``count``; the runs that begin with them are found no more."""
        start, stop = self._num_dead, self._num_dead + count
        for length, behind in zip(MATCH_TOKENS, self._behind, strict=True):
            end, mask = _packed(self._tokens[start : start + length - 1]), _mask(length)
            last = self._tokens[start + length - 1 : stop + length - 1]
            for place, token_id in enumerate(last, self._first + length):
                end = (end << _TOKEN_BITS | token_id) & mask
                if behind.get(end) == place:
                    del behind[end]
        self._first += count
        self._num_dead = stop
        if 2 * stop > len(self._tokens):
            del self._tokens[:stop]
            self._num_dead = 0

    def propose(self, count: int) -> list[int]:
        """At most ``count`` tokens that may come next; none where nothing is known.

        A copy may run into itself: what repeats with a period goes on repeating.
        """
        for length, behind, end in zip(MATCH_TOKENS, self._behind, self._ends, strict=True):
            place = behind.get(end) if len(self) > length else None
            if place is not None:
                period, source = self.num_seen - place, place - self.num_seen + len(self._tokens)
                return [self._tokens[source + i % period] for i in range(count)]
        return []


def _mask(length: int) -> int:
    return (1 << length * _TOKEN_BITS) - 1


def _packed(token_ids: Iterable[int]) -> int:
    run = 0
    for token_id in token_ids:
        run = run << _TOKEN_BITS | token_id
    return run
