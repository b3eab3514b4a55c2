"""How much may be on its way to one peer, by what the peer says it has written. Pure.

A window keeps choices late and queues short: what waits here can still be coded otherwise, or
not be sent at all. It is soft. Frames can be lost with a connection, and nothing tells: what
was silent for STALL_S is no longer counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.protocol.messages import KvProgress

STALL_S = 3.0
WINDOW_S = 0.1
"""Of the peer's rate, once there is one."""
MIN_FRAMES, MAX_FRAMES = 3, 16
WEIGHT = 0.3


@dataclass(slots=True)
class _Flight:
    epoch: int
    sent: int = 0
    written: int = 0


class Window:
    def __init__(self, max_frame_bytes: int) -> None:
        self._frame_bytes = max_frame_bytes
        self._flights: dict[str, _Flight] = {}
        self._moved_at = 0.0
        self._num_in_flight = 0
        self.bytes_per_s = 0.0
        """Smoothed; 0 until the peer has said anything."""

    @property
    def num_in_flight(self) -> int:
        """Bytes."""
        return self._num_in_flight

    @property
    def limit(self) -> int:
        if not self.bytes_per_s:
            return MIN_FRAMES * self._frame_bytes
        frames = WINDOW_S * self.bytes_per_s / self._frame_bytes
        return int(min(MAX_FRAMES, max(MIN_FRAMES, frames)) * self._frame_bytes)

    def has_room(self, num_bytes: int, now: float) -> bool:
        """Always when nothing is on its way."""
        if self._num_in_flight and now - self._moved_at > STALL_S:
            self._flights.clear()
            self._num_in_flight = 0
        return not self._num_in_flight or self._num_in_flight + num_bytes <= self.limit

    def sent(self, transfer_id: str, epoch: int, num_bytes: int, now: float) -> None:
        if not self._num_in_flight:
            self._moved_at = now
        flight = self._flights.get(transfer_id)
        if flight is None or flight.epoch != epoch:
            self.closed(transfer_id)
            flight = self._flights[transfer_id] = _Flight(epoch)
        flight.sent += num_bytes
        self._num_in_flight += num_bytes

    def progressed(self, progress: KvProgress, now: float) -> int:
        """Bytes that were written since the peer last said so. One said again changes nothing."""
        flight = self._flights.get(progress.transfer_id)
        if flight is None or flight.epoch != progress.epoch:
            return 0
        news = min(progress.num_bytes, flight.sent) - flight.written
        if news <= 0:
            return 0
        flight.written += news
        self._num_in_flight -= news
        seconds = max(now - self._moved_at, 1e-6)
        weight = WEIGHT if self.bytes_per_s else 1.0
        self.bytes_per_s += weight * (news / seconds - self.bytes_per_s)
        self._moved_at = now
        return news

    def closed(self, transfer_id: str) -> None:
        """Acknowledged as a whole, void or given up."""
        flight = self._flights.pop(transfer_id, None)
        if flight is not None:
            self._num_in_flight -= flight.sent - flight.written
