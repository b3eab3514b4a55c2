"""Masks of the rows that are constrained, filled from matchers and applied to their logits.

A matcher follows its sequence's output. It is never told what was drawn, but catches up with the
output that the next row shows: so it is right after a hand-over, a preemption, a draft that was
rejected or a step that was run twice, and where it is missing it is built from that output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import llguidance
import numpy as np
import numpy.typing as npt
import torch
from llguidance.numpy import fill_next_token_bitmask
from torch import Tensor

from baton.engine.sampling.rows import SampleRow
from baton.engine.structured.grammar import refused
from baton.engine.structured.store import GrammarStore
from baton.protocol.constraint import Constraint
from baton.protocol.errors import BatonError, InvalidRequest

EVERY_TOKEN = -1
"""As 32 bits."""
MAX_KEPT_MATCHERS = 4_096
"""Beyond it the one that was used least recently goes."""


@dataclass(slots=True)
class _Follower:
    """A matcher that has consumed ``consumed`` of its sequence's output."""

    constraint: Constraint
    matcher: llguidance.LLMatcher
    consumed: list[int]


class RowMasks:
    """One step's masks.

    rows: the constrained rows, by their index among the step's logits. bits:
    ``[R, ceil(V / 32)]`` int32, a bit per token, the lowest first, 1 for allowed.
    """

    def __init__(
        self,
        rows: Mapping[int, SampleRow],
        bits: npt.NDArray[np.int32],
        errors: dict[int, BatonError],
    ) -> None:
        self._rows = rows
        self._bits = bits
        self.errors = errors
        """By row: why its sequence cannot go on there, and what is drawn means nothing."""

    def apply(self, logits: Tensor) -> None:
        """Put -inf where a token is not allowed. logits: ``[S, V]``, changed in place.

        The last mask to be applied: a row that has nothing left belongs to a failed sequence,
        and its logits become all equal, so that drawing from it harms nobody.
        """
        if not self._rows:
            return
        rows = torch.tensor(list(self._rows), device=logits.device)
        masked = logits[rows].masked_fill_(~self._allowed(logits), float("-inf"))
        is_dead = masked.amax(dim=1) == float("-inf")
        masked[is_dead] = 0
        logits[rows] = masked
        for index in rows[is_dead].tolist():
            self.errors.setdefault(index, _nothing_left(self._rows[index]))

    def _allowed(self, logits: Tensor) -> Tensor:
        """``[R, V]`` bool."""
        packed = torch.from_numpy(self._bits.view(np.uint8)).to(logits.device)
        shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
        bits = (packed[:, :, None] >> shifts) & 1
        return bits.view(len(self._rows), -1)[:, : logits.shape[1]].bool()


class GrammarMasks:
    """The matchers of one worker's sequences. Used from the engine's thread alone."""

    def __init__(self, store: GrammarStore) -> None:
        self._store = store
        self._kept: dict[str, _Follower] = {}
        """By sequence id, the one used last at the end."""

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def forget(self, seq_ids: Iterable[str]) -> None:
        for seq_id in seq_ids:
            self._kept.pop(seq_id, None)

    def fill(self, rows: Sequence[SampleRow]) -> RowMasks:
        """The masks for the tokens behind each row's output. Errors stay with their sequence."""
        constrained = {i: row for i, row in enumerate(rows) if row.params.constraint is not None}
        num_words = -(-self._store.vocabulary.size // 32)
        bits = np.zeros((len(constrained), num_words), dtype=np.int32)
        errors: dict[int, BatonError] = {}
        for place, (index, row) in enumerate(constrained.items()):
            try:
                self._fill_row(row, bits, place)
            except BatonError as exc:
                errors[index] = exc
        while len(self._kept) > MAX_KEPT_MATCHERS:
            del self._kept[next(iter(self._kept))]
        return RowMasks(constrained, bits, errors)

    def _fill_row(self, row: SampleRow, bits: npt.NDArray[np.int32], place: int) -> None:
        constraint = row.params.constraint
        assert constraint is not None
        follower = self._kept.pop(row.seq_id, None)
        if follower is None or follower.constraint != constraint:
            follower = _Follower(constraint, self._store.matcher(constraint), [])
        if _follow(follower, row):
            fill_next_token_bitmask(follower.matcher, bits, place)
        else:
            bits[place] = EVERY_TOKEN
        if follower.matcher.is_error():
            self._store.forget(constraint)
            raise refused(constraint, follower.matcher.get_error())
        self._kept[row.seq_id] = follower


def _follow(follower: _Follower, row: SampleRow) -> bool:
    """Bring the matcher behind the row's output: take back what is not in it, consume what is new.

    False for a row behind a draft that the grammar does not allow: the row before it cannot draw
    that draft, so nobody will look at what this one draws. Errors show in the matcher's state.
    """
    output_ids = row.output_ids
    same = _common_length(follower.consumed, output_ids)
    if same < len(follower.consumed):
        follower.matcher.rollback(len(follower.consumed) - same)
        del follower.consumed[same:]
    num_known = len(output_ids) - row.num_drafts
    known, drafts = list(output_ids[same:num_known]), list(output_ids[max(same, num_known) :])
    follower.matcher.consume_tokens(known)
    follower.consumed += known
    num_allowed = follower.matcher.try_consume_tokens(drafts) if drafts else 0
    follower.consumed += drafts[:num_allowed]
    return num_allowed == len(drafts)


def _common_length(consumed: list[int], output_ids: Sequence[int]) -> int:
    """How much of ``consumed`` still holds: all of it, but for drafts that were rejected."""
    count = min(len(consumed), len(output_ids))
    if consumed[:count] == list(output_ids[:count]):
        return count
    return next(i for i in range(count) if consumed[i] != output_ids[i])


def _nothing_left(row: SampleRow) -> InvalidRequest:
    assert row.params.constraint is not None
    kind = row.params.constraint.kind
    return InvalidRequest(
        f"{kind} and the request's other limits on tokens (allowed_token_ids, bad words) leave no "
        f"token behind {len(row.output_ids)} tokens; allowed: limits that can be met together",
        param=kind,
    )
