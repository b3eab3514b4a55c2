"""Log-probabilities of the prompt tokens that a step's chunks predict."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor

from baton.engine.plan import FailedSequence, PromptLogprobs, SequenceChunk
from baton.engine.sampling.finite import NOT_FINITE, zero_bad_rows
from baton.engine.sampling.logprobs import token_logprobs
from baton.protocol.sampling import TokenLogprobs


def num_scored(chunk: SequenceChunk) -> int:
    """The chunk's first rows that predict a prompt token, where it asks for them.

    All do but one that samples: who asks has no output yet.
    """
    return len(chunk.token_ids) - chunk.samples if chunk.num_prompt_logprobs >= 0 else 0


class PromptScorer:
    """``add`` takes the logits of all scored rows of the plan, in its order, piece by piece:
    those of a whole prompt at once would be larger than the model."""

    def __init__(self, chunks: Iterable[SequenceChunk]) -> None:
        self._chunks = [c for c in chunks if num_scored(c)]
        self._found: list[TokenLogprobs] = []
        self._token_ids: list[int] = []
        self._num_best: list[int] = []
        self._seq_ids: list[str] = []
        self._bad: dict[str, None] = {}
        """Sequences of which a row is not finite."""
        for c in self._chunks:
            end = c.start + len(c.token_ids)
            self._token_ids += c.token_ids[1:] + (() if c.samples else c.prompt_ids[end : end + 1])
            self._num_best += [c.num_prompt_logprobs] * num_scored(c)
            self._seq_ids += [c.seq_id] * num_scored(c)

    def add(self, logits: Tensor) -> None:
        """logits: ``[P, V]`` float32; rows that are not finite are changed in place. Raises
        nothing: other ranks are in the same step."""
        rows = slice(len(self._found), len(self._found) + len(logits))
        self._bad |= {self._seq_ids[rows][row]: None for row in zero_bad_rows(logits)}
        token_ids = torch.tensor(self._token_ids[rows], device=logits.device)
        self._found += token_logprobs(logits.log_softmax(dim=-1), token_ids, self._num_best[rows])

    def parts(self) -> tuple[tuple[PromptLogprobs, ...], tuple[FailedSequence, ...]]:
        """One per chunk that asked, in the plan's order: what was found, and whose logits were
        not finite."""
        found = iter(self._found)
        parts = [
            PromptLogprobs(c.seq_id, c.start + 1, tuple(islice(found, num_scored(c))))
            for c in self._chunks
        ]
        return (
            tuple(part for part in parts if part.seq_id not in self._bad),
            tuple(
                FailedSequence(seq_id, NOT_FINITE.code, NOT_FINITE.message, NOT_FINITE.retryable)
                for seq_id in self._bad
            ),
        )
