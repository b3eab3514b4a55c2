"""What a worker owes to routers: tokens until acknowledged, failures, and an eye on who lives.

One of these in each worker's decider. Pure.
"""

from __future__ import annotations

from collections.abc import Callable

from baton.engine.plan import FailedSequence
from baton.protocol.messages import (
    AnyMessage,
    RequestBody,
    RequestFailed,
    RouterAlive,
    TokenAck,
    TokenItem,
)
from baton.worker.events import StepRaised, ToRouter
from baton.worker.outbox import TokenOutbox
from baton.worker.router_leases import RouterLeases

MAX_REASON_CHARS = 2_000


class RouterDesk:
    """holds: whether this worker has that attempt of that request in any form but tokens."""

    def __init__(
        self, worker_id: str, incarnation: str, role: str, holds: Callable[[str, int], bool]
    ) -> None:
        self._worker_id = worker_id
        self._role = role
        self._holds = holds
        self._outbox = TokenOutbox(worker_id, incarnation)
        self._leases = RouterLeases()

    @property
    def num_streams(self) -> int:
        """Requests whose tokens are not all acknowledged."""
        return self._outbox.num_streams

    def seen(self, router_id: str, now: float) -> None:
        self._leases.seen(router_id, now)

    def handle(self, sender_id: str, message: AnyMessage, now: float) -> list[object]:
        """TokenAck and RouterAlive; whatever else comes is not for this desk."""
        match message:
            case TokenAck():
                self._outbox.ack(message, now)
            case RouterAlive(_, attempts):
                self._leases.seen(sender_id, now)
                return [
                    self._missing(sender_id, held.request_id, held.attempt)
                    for held in attempts
                    if not self._holds(held.request_id, held.attempt)
                    and not self._outbox.holds(held.request_id, held.attempt)
                ]
        return []

    def _missing(self, router_id: str, request_id: str, attempt: int) -> ToRouter:
        """The dispatch, or what this worker said of its end, was lost with a connection."""
        reason = f"{self._worker_id} does not have the request"
        return ToRouter(
            router_id,
            RequestFailed(request_id, attempt, "unavailable", reason, True, self._role, ""),
        )

    def put(self, router_id: str, item: TokenItem, now: float) -> None:
        self._outbox.put(router_id, item, now)

    def flush(self) -> list[object]:
        return [*self._outbox.flush()]

    def forget(self, request_id: str, attempt: int) -> None:
        self._outbox.forget(request_id, attempt)

    def failed(
        self,
        body: RequestBody,
        code: str,
        reason: str,
        *,
        retryable: bool,
        suspect: str = "",
        hop: str = "",
    ) -> ToRouter:
        return ToRouter(
            body.router_id,
            RequestFailed(
                body.request_id,
                body.attempt,
                code,
                reason[:MAX_REASON_CHARS],
                retryable,
                hop or self._role,
                suspect,
            ),
        )

    def step_failed(self, body: RequestBody, seq_id: str, raised: StepRaised) -> ToRouter:
        """Of a request in a step that raised. Where another one is to blame, it hears nothing of
        that one, and this worker may take it again."""
        if raised.seq_id in ("", seq_id):
            reason, suspect = raised.message, self._worker_id
        else:
            reason, suspect = "the engine step raised because of another request in it", ""
        return self.failed(body, "internal", reason, retryable=True, suspect=suspect)

    def cannot_go_on(self, body: RequestBody, failed: FailedSequence) -> ToRouter:
        suspect = self._worker_id if failed.retryable else ""
        return self.failed(
            body, failed.code, failed.message, retryable=failed.retryable, suspect=suspect
        )

    def late(self, body: RequestBody) -> ToRouter:
        reason = f"the deadline passed in the {self._role} worker"
        return self.failed(body, "deadline_exceeded", reason, retryable=False)

    def tick(self, now: float) -> tuple[set[str], list[object]]:
        """Routers that went silent, whose requests are nobody's now; tokens to send again."""
        gone = set(self._leases.expired(now))
        for router_id in gone:
            self._outbox.forget_router(router_id)
        return gone, [*self._outbox.resend(now)]
