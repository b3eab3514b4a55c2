"""What the sampler must know of one row of logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.protocol.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class SampleRow:
    """position: of the token to draw, which keys the draw.

    output_ids: all tokens drawn for the sequence so far, those of earlier attempts and other
    workers included. It may be a list that grows later; it is read during the call only.
    num_drafts: so many at its end are guesses; the row counts only if they prove right.
    """

    seq_id: str
    params: SamplingParams
    position: int
    prompt_ids: tuple[int, ...]
    output_ids: Sequence[int]
    num_drafts: int = 0
