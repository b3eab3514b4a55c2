"""ZeroMQ, over TCP or over Unix sockets: works anywhere, and carries when nothing else does.

PUSH to PULL. Connects again by itself; parts that were in its queues or in the kernel's buffers
may then be lost without a word, or reach a new process at the same address, which knows no
epoch of theirs.

Fencing: none needed. Nobody writes into another's memory; what arrives late is refused by epoch.

With ``CurveKeys`` on both sides the link is encrypted, and the sender knows that it speaks to
the owner of the offered key. Who may send is not checked here.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio

from baton.messaging import sockets
from baton.messaging.turns import Turns
from baton.protocol.errors import ConfigError, WireError
from baton.protocol.messages import KvOffer
from kv_transfer.transports.contract import MAX_HEAD_BYTES, QUEUE_FRAMES, LinkLost, OnPart

log = logging.getLogger(__name__)

TCP, IPC = "zeromq", "zeromq_ipc"
_CURVE_BYTES = 64


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """One side's pair, as ``zmq.curve_keypair`` makes it; Z85, 40 characters each."""

    public: bytes
    secret: bytes


class ZeroMqSender:
    def __init__(
        self,
        context: zmq.asyncio.Context,
        kind: str,
        max_frame_bytes: int,
        curve: CurveKeys | None = None,
    ) -> None:
        assert kind in (TCP, IPC)
        self.kind = kind
        self.num_bytes = 0
        # Both ends' queues, and a part in the hands of either end's I/O thread.
        self.window_bytes = (2 * QUEUE_FRAMES + 2) * max_frame_bytes
        self._curve = curve
        self._is_closed = False
        self._socket = context.socket(zmq.PUSH)
        _configure(self._socket)

    async def connect(self, offer: KvOffer) -> None:
        if offer.public_key:
            if self._curve is None:
                raise LinkLost(f"{offer.address} wants CURVE, and this side was given no keys")
            self._socket.curve_publickey = self._curve.public
            self._socket.curve_secretkey = self._curve.secret
            self._socket.curve_serverkey = offer.public_key.encode()
        elif self._curve is not None:
            raise LinkLost(f"{offer.address} offers no CURVE key, and this side has keys")
        try:
            sockets.connect(self._socket, offer.address)
        except WireError as exc:
            raise LinkLost(exc.message) from exc

    async def room(self, num_bytes: int) -> None:
        self._check_open()
        poll: Any = self._socket.poll  # The stubs do not know that this one takes flags.
        try:
            await poll(flags=zmq.POLLOUT)
        except zmq.ZMQError as exc:
            raise LinkLost(f"the KV socket is closed: {exc}") from exc

    async def send(self, head: bytes, payload: memoryview | None) -> None:
        self._check_open()
        parts = [head] if payload is None else [head, payload]
        try:
            await self._socket.send_multipart(parts, copy=False)
        except zmq.ZMQError as exc:
            raise LinkLost(f"the KV socket is closed: {exc}") from exc
        if payload is not None:
            self.num_bytes += payload.nbytes

    def _check_open(self) -> None:
        if self._is_closed:
            raise LinkLost("the KV socket is closed")

    def close(self) -> None:
        self._is_closed = True
        self._socket.close()


class ZeroMqReceiver:
    def __init__(
        self,
        context: zmq.asyncio.Context,
        kind: str,
        on_part: OnPart,
        curve: CurveKeys | None = None,
    ) -> None:
        assert kind in (TCP, IPC)
        self.kind = kind
        self.num_bytes = 0
        self.num_dropped = 0
        self._on_part = on_part
        self._public_key = ""
        self._socket = context.socket(zmq.PULL)
        _configure(self._socket)
        if curve is not None:
            self._public_key = curve.public.decode()
            self._socket.curve_server = True
            self._socket.curve_publickey = curve.public
            self._socket.curve_secretkey = curve.secret

    def bind(self, host: str) -> KvOffer:
        if self.kind == TCP:
            return KvOffer(self.kind, sockets.bind(self._socket, host), self._public_key)
        # "@": a name of the kernel's, not of a file that could stay behind.
        address = f"ipc://@baton-kv-{secrets.token_hex(16)}"
        try:
            self._socket.bind(address)
        except zmq.ZMQError as exc:
            raise ConfigError(f"cannot bind {address}: {exc}") from exc
        return KvOffer(self.kind, address, self._public_key)

    async def run(self) -> None:
        turns = Turns()
        try:
            while True:
                parts = await self._socket.recv_multipart(copy=False)
                if len(parts) > 2 or len(parts[0]) > MAX_HEAD_BYTES:
                    self._drop(f"{len(parts)} parts, the first of {len(parts[0])} bytes")
                    continue
                payload = parts[1].buffer if len(parts) == 2 else None
                if payload is not None:
                    self.num_bytes += payload.nbytes
                await self._on_part(parts[0].buffer, payload)
                await turns.take()
        finally:
            self.close()

    def _drop(self, what: str) -> None:
        self.num_dropped += 1
        if self.num_dropped & (self.num_dropped - 1) == 0:
            log.warning("dropped KV: %s (%d dropped so far)", what, self.num_dropped)

    def close(self) -> None:
        self._socket.close()


def _configure(socket: zmq.asyncio.Socket) -> None:
    # CURVE puts its nonce and tag around each part.
    largest = sockets.MAX_PART_BYTES + _CURVE_BYTES
    sockets.configure(socket, queue_frames=QUEUE_FRAMES, max_part_bytes=largest)
