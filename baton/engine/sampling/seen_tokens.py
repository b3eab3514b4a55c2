"""The distinct tokens of one sequence, and how often its output holds each.

Sparse: memory and time grow with the tokens that occur, never with the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

_FIRST_ROOM = 64


class SeenTokens:
    def __init__(self, prompt_ids: Sequence[int]) -> None:
        """Tokens of the prompt are known with a count of 0."""
        known = np.unique(np.asarray(prompt_ids, dtype=np.int64))
        self._place_of = {token_id: place for place, token_id in enumerate(known.tolist())}
        self._ids = np.resize(known, max(_FIRST_ROOM, 2 * len(known)))
        self._counts = np.zeros(len(self._ids), dtype=np.float32)

    def add(self, token_ids: Sequence[int]) -> None:
        """Count tokens of the output. Amortised O(1) each."""
        for token_id in token_ids:
            place = self._place_of.setdefault(token_id, len(self._place_of))
            if place == len(self._ids):
                self._ids = np.resize(self._ids, 2 * place)
                self._counts = np.concatenate([self._counts, np.zeros(place, dtype=np.float32)])
            self._ids[place] = token_id
            self._counts[place] += 1

    @property
    def ids(self) -> Ints:
        """``[N]``, each once. A view: read it before the next ``add``."""
        return self._ids[: len(self._place_of)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """``[N]``, in the order of ``ids``; exact, as outputs are far shorter than 2**24."""
        return self._counts[: len(self._place_of)]
