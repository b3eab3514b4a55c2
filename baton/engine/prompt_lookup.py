"""Guesses how a sequence goes on from what it has said before: no draft model. Pure.

The last few tokens are looked for among all earlier ones of prompt and output; what followed
there, at its latest occurrence, is the draft. Answers that quote, edit or repeat are guessed well
(prompt lookup; CopySpec, arXiv 2502.08923). Amortised O(1) and some 300 bytes per token.
"""

from __future__ import annotations

from collections.abc import Sequence

MATCH_TOKENS = (5, 3)
"""Lengths of ends that are looked for, the longest first: a longer match guesses better."""
MAX_INDEXED_TOKENS = 65_536
"""Then the older half is forgotten."""


class PromptLookup:
    """One sequence's tokens, as far as ``extend`` has brought them."""

    def __init__(self) -> None:
        self.num_seen = 0
        """Tokens of the sequence so far, those forgotten included."""
        self._tokens: list[int] = []
        self._behind: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in MATCH_TOKENS)
        """Per length: where in ``_tokens`` the latest occurrence of a run goes on."""

    def extend(self, token_ids: Sequence[int]) -> None:
        self.num_seen += len(token_ids)
        tokens = self._tokens
        for token_id in token_ids:
            place = len(tokens)
            for length, behind in zip(MATCH_TOKENS, self._behind, strict=True):
                if place >= length:
                    behind[tuple(tokens[place - length :])] = place
            tokens.append(token_id)
        if len(tokens) > MAX_INDEXED_TOKENS:
            self._forget_older_half()

    def propose(self, count: int) -> list[int]:
        """At most ``count`` tokens that may come next; none where nothing is known.

        A copy may run into itself: what repeats with a period goes on repeating.
        """
        tokens = self._tokens
        for length, behind in zip(MATCH_TOKENS, self._behind, strict=True):
            source = behind.get(tuple(tokens[-length:])) if len(tokens) > length else None
            if source is not None:
                period = len(tokens) - source
                return [tokens[source + i % period] for i in range(count)]
        return []

    def _forget_older_half(self) -> None:
        kept = self._tokens[-(MAX_INDEXED_TOKENS // 2) :]
        self._tokens = []
        self._behind = tuple({} for _ in MATCH_TOKENS)
        # They were counted when they came first.
        self.num_seen -= len(kept)
        self.extend(kept)
