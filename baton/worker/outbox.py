"""Tokens on their way to routers: one batch a step per router, kept until acknowledged. Pure.

Delivery is at least once (the router drops what it has), so a broken connection costs time
and no token. What a request still has in here outlives the request itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from baton.protocol.messages import TokenAck, TokenBatch, TokenItem
from baton.worker.events import ToRouter

RESEND_AFTER_S = 1.0
MAX_BATCH_BYTES = 4 * 2**20
"""Estimated, in one message: messages have a cap, and log-probabilities can be many."""
_ITEM_BYTES = 512
"""Of a token with its log-probabilities and times."""
_LOGPROB_BYTES = 16


@dataclass(slots=True)
class _Stream:
    router_id: str
    unacked: list[TokenItem] = field(default_factory=list)
    waits_since: float = 0.0
    """When the oldest of them was sent, or the last acknowledgement of older ones came."""


class TokenOutbox:
    def __init__(self, worker_id: str, incarnation: str) -> None:
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._streams: dict[tuple[str, int], _Stream] = {}
        self._fresh: dict[str, list[TokenItem]] = {}

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def holds(self, request_id: str, attempt: int) -> bool:
        return (request_id, attempt) in self._streams

    def put(self, router_id: str, item: TokenItem, now: float) -> None:
        stream = self._streams.setdefault((item.request_id, item.attempt), _Stream(router_id))
        if not stream.unacked:
            stream.waits_since = now
        stream.unacked.append(item)
        self._fresh.setdefault(router_id, []).append(item)

    def flush(self) -> list[ToRouter]:
        """Everything put since the last flush, one message per router unless it is large."""
        fresh, self._fresh = self._fresh, {}
        return self._batches(fresh)

    def ack(self, ack: TokenAck, now: float) -> None:
        for item in ack.items:
            key = (item.request_id, item.attempt)
            stream = self._streams.get(key)
            if stream is None:
                continue
            unacked = [t for t in stream.unacked if t.seq + len(t.token_ids) > item.next_seq]
            if not unacked:
                del self._streams[key]
            elif len(unacked) < len(stream.unacked):
                stream.unacked, stream.waits_since = unacked, now

    def resend(self, now: float) -> list[ToRouter]:
        """What has waited too long for its acknowledgement, again."""
        late: dict[str, list[TokenItem]] = {}
        for stream in self._streams.values():
            if now - stream.waits_since > RESEND_AFTER_S:
                stream.waits_since = now
                late.setdefault(stream.router_id, []).extend(stream.unacked)
        return self._batches(late)

    def forget(self, request_id: str, attempt: int) -> None:
        """Drop this attempt's tokens and those of all older ones: nobody wants them."""
        for key in [k for k in self._streams if k[0] == request_id and k[1] <= attempt]:
            del self._streams[key]

    def forget_router(self, router_id: str) -> None:
        for key in [k for k, s in self._streams.items() if s.router_id == router_id]:
            del self._streams[key]

    def _batches(self, items_of: dict[str, list[TokenItem]]) -> list[ToRouter]:
        return [
            ToRouter(router_id, TokenBatch(self._worker_id, self._incarnation, part))
            for router_id, items in items_of.items()
            for part in _parts(items)
        ]


def _parts(items: list[TokenItem]) -> Iterator[tuple[TokenItem, ...]]:
    part: list[TokenItem] = []
    num_bytes = 0
    for item in items:
        size = _estimated_bytes(item)
        if part and num_bytes + size > MAX_BATCH_BYTES:
            yield tuple(part)
            part, num_bytes = [], 0
        part.append(item)
        num_bytes += size
    if part:
        yield tuple(part)


def _estimated_bytes(item: TokenItem) -> int:
    num_logprobs = sum(len(found.top) + 1 for found in item.prompt_logprobs)
    return _ITEM_BYTES * len(item.token_ids) + _LOGPROB_BYTES * num_logprobs
