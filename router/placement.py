"""Where a request goes: filter, score, pick. Pure.

Load is charged to both workers at once when a request is placed, and given back by the
router as the request moves on, so that a burst placed between two load reports spreads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from router.kv_fit import goes_unchanged
from router.members import Member

GROWTH_TOKENS = 256
"""Output charged to a decode worker at placement, when max_tokens allows as much."""


@dataclass(frozen=True, slots=True)
class Need:
    """num_tokens: known now (prompt, and output so far). max_new_tokens: still to come.

    fingerprint: the KV layout that workers must have; "" for any.
    """

    num_tokens: int
    max_new_tokens: int
    fingerprint: str = ""

    @property
    def decode_charge(self) -> int:
        return self.num_tokens + min(self.max_new_tokens, GROWTH_TOKENS)

    @property
    def longest(self) -> int:
        """Tokens whose KV must fit at once: the last one drawn is never computed."""
        return self.num_tokens + self.max_new_tokens - 1


@dataclass(slots=True)
class Placement:
    """prefill is None where ``decode`` (a mixed instance) runs both phases."""

    prefill: Member | None
    decode: Member
    prefill_charge: int
    decode_charge: int

    def first_token_came(self) -> None:
        """Prefill is over: its charge goes back."""
        if self.prefill is not None:
            self.prefill.charged_tokens -= self.prefill_charge
            self.prefill_charge = 0

    def release(self) -> None:
        self.first_token_came()
        self.decode.charged_tokens -= self.decode_charge
        self.decode_charge = 0

    def involves(self, worker_id: str) -> bool:
        in_prefill = self.prefill is not None and self.prefill.worker_id == worker_id
        return in_prefill or self.decode.worker_id == worker_id


class Placer:
    def __init__(self, policy: Literal["least_loaded", "round_robin"]) -> None:
        self._policy = policy
        self._num_placed = 0

    def place(
        self, need: Need, members: Iterable[Member], exclude: frozenset[str]
    ) -> Placement | None:
        """Charge and return the best pair (or mixed instance), None when there is none.

        exclude: worker ids to avoid; they are used all the same when nothing else is left.
        """
        up = [m for m in members if m.is_placeable and need.fingerprint in ("", m.fingerprint)]
        fresh = [m for m in up if m.worker_id not in exclude]
        return self._pick(need, fresh) or (self._pick(need, up) if exclude else None)

    def _pick(self, need: Need, up: list[Member]) -> Placement | None:
        roomy = [m for m in up if m.capacity_tokens >= need.longest]
        decodes = sorted((m for m in roomy if m.role == "decode"), key=self._score)
        prefills = sorted(
            (m for m in up if m.role == "prefill" and m.capacity_tokens >= need.num_tokens),
            key=self._score,
        )
        for decode in decodes:
            for prefill in prefills:
                if goes_unchanged(prefill, decode):
                    return self._charge(need, prefill, decode)
        mixed = min((m for m in roomy if m.role == "mixed"), key=self._score, default=None)
        return None if mixed is None else self._charge(need, None, mixed)

    def _score(self, member: Member) -> tuple[float, int, str]:
        """Lower is better; ties go to whoever was placed on longest ago."""
        load = 0.0 if self._policy == "round_robin" else self._load(member)
        return (load, member.placed_last, member.worker_id)

    def _load(self, member: Member) -> float:
        if member.role == "prefill":
            return float(member.charged_tokens)
        return member.charged_tokens / max(1, member.capacity_tokens)

    def _charge(self, need: Need, prefill: Member | None, decode: Member) -> Placement:
        self._num_placed += 1
        placement = Placement(
            prefill, decode, need.num_tokens if prefill else 0, need.decode_charge
        )
        if prefill is not None:
            prefill.charged_tokens += placement.prefill_charge
            prefill.placed_last = self._num_placed
        decode.charged_tokens += placement.decode_charge
        decode.placed_last = self._num_placed
        return placement

    def never_fits(self, need: Need, members: Iterable[Member]) -> int | None:
        """The largest request that fits now, when workers are up but all are too small."""
        decodes = [m for m in members if m.is_placeable and m.role != "prefill"]
        largest = max((m.capacity_tokens for m in decodes), default=None)
        return largest if largest is not None and largest < need.longest else None
