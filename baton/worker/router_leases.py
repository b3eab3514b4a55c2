"""Which routers are alive: the requests of one that went silent are nobody's. Pure."""

from __future__ import annotations

ROUTER_LEASE_S = 10.0


class RouterLeases:
    def __init__(self) -> None:
        self._seen_at: dict[str, float] = {}

    def seen(self, router_id: str, now: float) -> None:
        self._seen_at[router_id] = now

    def expired(self, now: float) -> list[str]:
        """Routers silent for a whole lease, each named once."""
        gone = [r for r, at in self._seen_at.items() if now - at > ROUTER_LEASE_S]
        for router_id in gone:
            del self._seen_at[router_id]
        return gone
