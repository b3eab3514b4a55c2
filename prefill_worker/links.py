"""This worker's connections to decode workers: a message link and a KV link each.

Made when first needed, closed when unused for a while. Decides nothing but the KV link's
transport, which ``kv_transfer.transports.choose`` orders: a refusal is an event.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import zmq.asyncio

from baton.messaging.link import Link
from baton.protocol.config import KvTransferConfig
from baton.protocol.errors import IncompatiblePeer, RankLost, WireError
from baton.protocol.layout import KvLayout, why_not_unchanged
from baton.protocol.messages import (
    AnyMessage,
    Hello,
    HelloReply,
    KvLink,
    KvOffer,
    KvProgress,
    Message,
    WorkerRef,
)
from kv_transfer.coding import KvCoding
from kv_transfer.controller import CodecController
from kv_transfer.instructions import PushEnd, PushKv
from kv_transfer.pusher import KvPusher, ReadKv
from kv_transfer.transports.choose import offers_of
from kv_transfer.transports.make import make_sender
from kv_transfer.transports.uplink import Uplink

log = logging.getLogger(__name__)

IDLE_S = 120.0
MAX_REASON = 500


@dataclass(slots=True)
class _Connection:
    link: Link
    pusher: KvPusher
    uplink: Uplink
    tasks: list[asyncio.Task[None]]
    used_at: float
    decode_id: str
    is_greeted: bool = False

    def links(self) -> Iterator[KvLink]:
        """What sends now, first; then what sent before it was lost."""
        sent = self.uplink.bytes_by_kind()
        kind = self.uplink.kind
        if kind:
            yield self.pusher.told(
                KvLink(self.decode_id, kind, self.uplink.reason[:MAX_REASON], sent.pop(kind, 0))
            )
        for other, count in sent.items():
            yield KvLink(self.decode_id, other, "", count)


class DecodeLinks:
    def __init__(
        self,
        context: zmq.asyncio.Context,
        hello: Hello,
        layout: KvLayout,
        config: KvTransferConfig,
        read_kv: ReadKv,
        *,
        on_message: Callable[[WorkerRef, AnyMessage], None],
        on_refused: Callable[[WorkerRef, str], None],
        coding: KvCoding | None = None,
        make_controller: Callable[[], CodecController | None] = lambda: None,
        reads_beside: bool = False,
    ) -> None:
        """coding, reads_beside: see ``KvPusher``. make_controller: called for each link."""
        self._context = context
        self._hello = hello
        self._layout = layout
        self._config = config
        self._read_kv = read_kv
        self._on_message = on_message
        self._on_refused = on_refused
        self._coding = coding
        self._make_controller = make_controller
        self._reads_beside = reads_beside
        self._connections: dict[WorkerRef, _Connection] = {}
        self._group: asyncio.TaskGroup | None = None
        self._closed_bytes: Counter[str] = Counter()

    def links(self) -> tuple[KvLink, ...]:
        """The KV link of each decode worker, and what links that are closed sent."""
        closed = [KvLink("(closed)", kind, "", count) for kind, count in self._closed_bytes.items()]
        return (*(link for c in self._connections.values() for link in c.links()), *closed)

    async def run(self) -> None:
        """Own the links' tasks until cancelled."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            await asyncio.get_running_loop().create_future()

    def send(self, decode: WorkerRef, message: Message, now: float) -> None:
        try:
            connection = self._connection(decode, now)
        except WireError as exc:
            self._on_refused(decode, exc.message)
            return
        if not connection.link.send(message):
            self._refuse(decode, "too many messages wait for its first answer")

    def push(self, job: PushKv | PushEnd, now: float) -> None:
        connection = self._connections.get(job.decode)
        if connection is not None:  # else it was refused, and its transfers with it
            connection.used_at = now
            connection.pusher.put(job)

    def cancel_push(self, transfer_id: str, *, is_committed: bool = False) -> None:
        for connection in self._connections.values():
            connection.pusher.cancel(transfer_id, is_committed=is_committed)

    def close_idle(self, now: float) -> None:
        for decode, connection in list(self._connections.items()):
            if now - connection.used_at > IDLE_S:
                self._close(decode)

    def _connection(self, decode: WorkerRef, now: float) -> _Connection:
        connection = self._connections.get(decode)
        if connection is None:
            connection = self._connections[decode] = self._connect(decode, now)
        connection.used_at = now
        return connection

    def _connect(self, decode: WorkerRef, now: float) -> _Connection:
        """Raises WireError: whoever named that address was wrong, and nobody else suffers."""
        assert self._group is not None
        link = Link(
            self._context,
            decode.address,
            self._hello,
            on_message=lambda message: self._heard(decode, message),
            on_reply=lambda reply: self._greeted(decode, reply),
        )
        link.connect()
        frame_bytes = self._config.max_frame_bytes
        pusher = KvPusher(
            self._layout,
            frame_bytes,
            self._read_kv,
            coding=self._coding,
            controller=self._make_controller(),
            reads_beside=self._reads_beside,
        )
        uplink = Uplink(
            decode.worker_id,
            self._config.transport,
            lambda kind: make_sender(kind, self._context, frame_bytes),
        )
        task = self._group.create_task(link.run(), name=f"link to {decode.worker_id}")
        return _Connection(link, pusher, uplink, [task], now, decode.worker_id)

    def _heard(self, decode: WorkerRef, message: AnyMessage) -> None:
        if isinstance(message, KvProgress):
            connection = self._connections.get(decode)
            if connection is not None:
                connection.pusher.progressed(message)
        self._on_message(decode, message)

    def _greeted(self, decode: WorkerRef, reply: HelloReply) -> None:
        connection = self._connections.get(decode)
        if connection is None:
            return
        if reply.refusal:
            self._refuse(decode, reply.refusal)
        elif reply.incarnation != decode.incarnation:
            self._refuse(decode, f"{decode.worker_id} is another incarnation by now")
        elif misfit := self._misfit(reply):
            self._refuse(decode, f"KV does not fit {decode.worker_id}: {misfit}")
        elif not connection.is_greeted:
            assert self._group is not None
            connection.is_greeted = True
            carry = self._carry(decode, connection, offers_of(reply))
            task = self._group.create_task(carry, name=f"KV to {decode.worker_id}")
            connection.tasks.append(task)

    def _misfit(self, reply: HelloReply) -> str:
        """Known before there is any KV, but of peers of wire version 1, who say a fingerprint."""
        if reply.layout is not None:
            return why_not_unchanged(self._layout, reply.layout)
        known = self._layout.fingerprint(1) if self._layout.is_uniform else ""
        if reply.layout_fingerprint == known:
            return ""
        return "model folder, dtype or version differ"

    async def _carry(
        self, decode: WorkerRef, connection: _Connection, offers: tuple[KvOffer, ...]
    ) -> None:
        """Choose the KV link's transport, then push whatever is put, until cancelled. What goes
        wrong here costs this peer's transfers and nobody else's."""
        try:
            await connection.uplink.open(offers)
            async with asyncio.TaskGroup() as group:
                group.create_task(connection.uplink.run(), name=f"KV link to {decode.worker_id}")
                await connection.pusher.run(connection.uplink)
        except IncompatiblePeer as exc:
            self._refuse(decode, exc.message)
        except Exception as exc:
            cause = _first(exc)
            if isinstance(cause, RankLost):
                raise  # It is this worker that cannot go on.
            log.exception("the KV link to %s broke", decode.worker_id)
            if self._connections.get(decode) is connection:
                reason = f"the KV link broke: {type(cause).__name__}: {cause}"
                self._refuse(decode, reason[:MAX_REASON])

    def _refuse(self, decode: WorkerRef, reason: str) -> None:
        self._on_refused(decode, reason)
        self._close(decode)

    def _close(self, decode: WorkerRef) -> None:
        connection = self._connections.pop(decode)
        self._closed_bytes.update(connection.uplink.bytes_by_kind())
        connection.link.close()
        connection.uplink.close()
        for task in connection.tasks:
            task.cancel()


def _first(error: Exception) -> Exception:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
