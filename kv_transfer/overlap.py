"""Whether a chunk's KV goes layer after layer while it is computed, and in how many parts. Pure.

Sending parts hides the link behind the computation; each part costs a frame's worth of work at
both ends. Short chunks on fast links are better sent whole (Splitwise, arXiv 2311.18677, section
4.3): the switch point follows from the estimates here, and ``benchmarks/kv_overlap.py`` measures
it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

PART_S = 0.0006
"""What one part more costs: the step that it is taken out of, and again on its way."""
HIDDEN_PART = 0.6
"""Of a step's time: what the link moves in less is sent whole, for the next step hides it."""
WEIGHT = 0.3


def parts_of(
    num_layers: int,
    compute_s: float,
    link_s: float,
    *,
    backlog_s: float = 0.0,
    part_s: float = PART_S,
) -> int:
    """Into how many parts of layers to cut a chunk, for its last row to be there soonest.

    compute_s: of the step. link_s: to move the whole chunk. backlog_s: what is before it on the
    link. 1: whole, when its step is over.
    """
    best, parts = exposed_s(1, compute_s, link_s, backlog_s, part_s), 1
    for count in range(2, num_layers + 1):
        seconds = exposed_s(count, compute_s, link_s, backlog_s, part_s)
        if seconds < best:
            best, parts = seconds, count
    return parts


def exposed_s(
    parts: int, compute_s: float, link_s: float, backlog_s: float, part_s: float
) -> float:
    """From when the step would end if nothing were sent meanwhile until all parts are there."""
    slowed_s = compute_s + (parts - 1) * part_s
    done = backlog_s
    for part in range(1, parts + 1):
        done = max(done, slowed_s * part / parts) + link_s / parts + part_s
    return done - compute_s


def layer_marks(num_layers: int, parts: int) -> tuple[int, ...]:
    """Numbers of leading layers after which a part goes; the last part goes with the step."""
    return tuple(part * num_layers // parts for part in range(1, parts))


@dataclass(slots=True)
class PushRate:
    """How fast one peer's rows move, from being final here to being written there: bytes of KV
    as it is, whatever it is coded by."""

    bytes_per_s: float = 0.0
    """Smoothed; 0 until anything was written."""
    _waiting: dict[str, deque[tuple[int, int]]] = field(default_factory=dict)
    """By transfer: (number of frames, raw bytes) up to each frame that is on its way."""
    _num_waiting: int = 0
    _moved_at: float = 0.0

    @property
    def backlog_s(self) -> float:
        return self._num_waiting / self.bytes_per_s if self.bytes_per_s else 0.0

    def pushed(self, transfer_id: str, first_index: int, sizes: list[int], now: float) -> None:
        if not self._num_waiting:
            self._moved_at = now
        frames = self._waiting.setdefault(transfer_id, deque())
        for index, size in enumerate(sizes, first_index + 1):
            frames.append((index, size))
        self._num_waiting += sum(sizes)

    def written(self, transfer_id: str, num_frames: int, now: float) -> None:
        """So many frames of the transfer are written, in all."""
        frames, news = self._waiting.get(transfer_id), 0
        while frames and frames[0][0] <= num_frames:
            news += frames.popleft()[1]
        if not news:
            return
        self._num_waiting -= news
        seconds = max(now - self._moved_at, 1e-6)
        self._moved_at = now
        weight = WEIGHT if self.bytes_per_s else 1.0
        self.bytes_per_s += weight * (news / seconds - self.bytes_per_s)

    def closed(self, transfer_id: str) -> None:
        """Given up, or to be sent again."""
        self._num_waiting -= sum(size for _, size in self._waiting.pop(transfer_id, ()))


@dataclass(slots=True)
class StepRate:
    """Seconds of a step, by its tokens."""

    seconds_per_token: float = 0.0

    def ran(self, num_tokens: int, seconds: float) -> None:
        sample = seconds / max(1, num_tokens)
        weight = WEIGHT if self.seconds_per_token else 1.0
        self.seconds_per_token += weight * (sample - self.seconds_per_token)
