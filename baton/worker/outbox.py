"""Tokens on their way to routers: one batch a step per router, kept until acknowledged. Pure.

Delivery is at least once (the router drops what it has), so a broken connection costs time
and no token. What a request still has in here outlives the request itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.protocol.messages import MAX_BATCH_ITEMS, TokenAck, TokenBatch, TokenItem
from baton.worker.events import ToRouter

RESEND_AFTER_S = 1.0


@dataclass(slots=True)
class _Stream:
    router_id: str
    unacked: list[TokenItem] = field(default_factory=list)
    sent_at: float = 0.0


class TokenOutbox:
    def __init__(self, worker_id: str, incarnation: str) -> None:
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._streams: dict[tuple[str, int], _Stream] = {}
        self._fresh: dict[str, list[TokenItem]] = {}

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def put(self, router_id: str, item: TokenItem, now: float) -> None:
        stream = self._streams.setdefault((item.request_id, item.attempt), _Stream(router_id))
        stream.unacked.append(item)
        stream.sent_at = now
        self._fresh.setdefault(router_id, []).append(item)

    def flush(self) -> list[ToRouter]:
        """Everything put since the last flush, one message per router."""
        batches = [self._batch(router_id, items) for router_id, items in self._fresh.items()]
        self._fresh = {}
        return batches

    def ack(self, ack: TokenAck) -> None:
        for item in ack.items:
            key = (item.request_id, item.attempt)
            stream = self._streams.get(key)
            if stream is None:
                continue
            stream.unacked = [t for t in stream.unacked if t.seq + len(t.token_ids) > item.next_seq]
            if not stream.unacked:
                del self._streams[key]

    def resend(self, now: float) -> list[ToRouter]:
        """What has waited too long for its acknowledgement, again."""
        late: dict[str, list[TokenItem]] = {}
        for stream in self._streams.values():
            if now - stream.sent_at > RESEND_AFTER_S:
                stream.sent_at = now
                late.setdefault(stream.router_id, []).extend(stream.unacked)
        return [
            self._batch(router_id, items[start : start + MAX_BATCH_ITEMS])
            for router_id, items in late.items()
            for start in range(0, len(items), MAX_BATCH_ITEMS)
        ]

    def forget(self, request_id: str, attempt: int) -> None:
        """Drop this attempt's tokens and those of all older ones: nobody wants them."""
        for old in range(attempt + 1):
            self._streams.pop((request_id, old), None)

    def forget_router(self, router_id: str) -> None:
        for key in [k for k, s in self._streams.items() if s.router_id == router_id]:
            del self._streams[key]

    def _batch(self, router_id: str, items: list[TokenItem]) -> ToRouter:
        return ToRouter(router_id, TokenBatch(self._worker_id, self._incarnation, tuple(items)))
