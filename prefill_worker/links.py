"""This worker's connections to decode workers: a message link and a KV link each.

Made when first needed, closed when unused for a while. No decisions: a refusal is an event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import zmq.asyncio

from baton.messaging.link import Link
from baton.protocol.errors import WireError
from baton.protocol.layout import KvLayout
from baton.protocol.messages import AnyMessage, Hello, HelloReply, Message, WorkerRef
from kv_transfer.instructions import PushEnd, PushKv
from kv_transfer.zeromq import KvPusher, ReadKv

IDLE_S = 120.0


@dataclass(slots=True)
class _Connection:
    link: Link
    pusher: KvPusher
    tasks: list[asyncio.Task[None]]
    used_at: float
    kv_address: str = ""


class DecodeLinks:
    def __init__(
        self,
        context: zmq.asyncio.Context,
        hello: Hello,
        layout: KvLayout,
        max_frame_bytes: int,
        read_kv: ReadKv,
        *,
        on_message: Callable[[WorkerRef, AnyMessage], None],
        on_refused: Callable[[WorkerRef, str], None],
    ) -> None:
        self._context = context
        self._hello = hello
        self._layout = layout
        self._max_frame_bytes = max_frame_bytes
        self._read_kv = read_kv
        self._on_message = on_message
        self._on_refused = on_refused
        self._connections: dict[WorkerRef, _Connection] = {}
        self._group: asyncio.TaskGroup | None = None
        self._closed_bytes = 0

    @property
    def num_bytes(self) -> int:
        return self._closed_bytes + sum(c.pusher.num_bytes for c in self._connections.values())

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

    def cancel_push(self, transfer_id: str) -> None:
        for connection in self._connections.values():
            connection.pusher.cancel(transfer_id)

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
            on_message=lambda message: self._on_message(decode, message),
            on_reply=lambda reply: self._greeted(decode, reply),
        )
        link.connect()
        pusher = KvPusher(self._context, self._layout, self._max_frame_bytes, self._read_kv)
        task = self._group.create_task(link.run(), name=f"link to {decode.worker_id}")
        return _Connection(link, pusher, [task], now)

    def _greeted(self, decode: WorkerRef, reply: HelloReply) -> None:
        connection = self._connections.get(decode)
        if connection is None:
            return
        if reply.refusal:
            self._refuse(decode, reply.refusal)
        elif reply.incarnation != decode.incarnation:
            self._refuse(decode, f"{decode.worker_id} is another incarnation by now")
        elif not connection.kv_address:
            assert self._group is not None
            try:
                connection.pusher.connect(reply.kv_address)
            except WireError as exc:
                self._refuse(decode, exc.message)
                return
            connection.kv_address = reply.kv_address
            task = self._group.create_task(
                connection.pusher.run(), name=f"KV to {decode.worker_id}"
            )
            connection.tasks.append(task)

    def _refuse(self, decode: WorkerRef, reason: str) -> None:
        self._on_refused(decode, reason)
        self._close(decode)

    def _close(self, decode: WorkerRef) -> None:
        connection = self._connections.pop(decode)
        self._closed_bytes += connection.pusher.num_bytes
        connection.link.close()
        connection.pusher.close()
        for task in connection.tasks:
            task.cancel()
