"""The bound end of the message plane: many peers connect, each says hello, then both talk.

A peer is named by its routing id, ``sender_id|incarnation``: a restarted process is another
peer. Whatever does not decode, or comes before an accepted hello, is counted and dropped;
it can cost its sender the message, never another peer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import zmq
import zmq.asyncio

from baton.messaging import sockets
from baton.messaging.codec import decode, encode
from baton.messaging.turns import Turns
from baton.protocol.errors import WireError
from baton.protocol.messages import (
    OLDEST_WIRE_VERSION,
    WIRE_VERSION,
    AnyMessage,
    Hello,
    HelloReply,
    Message,
)

log = logging.getLogger(__name__)

MAX_PEERS = 4_096
NOT_GREETED = "say hello first"
"""The refusal that a link answers by greeting (again); others are final."""


@dataclass(frozen=True, slots=True)
class Peer:
    sender_id: str
    incarnation: str
    role: str
    version: int

    @property
    def key(self) -> str:
        return peer_key(self.sender_id, self.incarnation)


def peer_key(sender_id: str, incarnation: str) -> str:
    return f"{sender_id}|{incarnation}"


def agree_on_version(hello: Hello) -> int:
    """The highest version that both sides speak, 0 when there is none."""
    version = min(hello.newest_version, WIRE_VERSION)
    return version if version >= max(hello.oldest_version, OLDEST_WIRE_VERSION) else 0


def why_not(hello: Hello) -> str:
    """For the log of whoever said a hello in which no version is in common."""
    if hello.newest_version < OLDEST_WIRE_VERSION:
        older = f"upgrade {hello.sender_id}"
    elif hello.oldest_version > WIRE_VERSION:
        older = "upgrade the one that was greeted"
    else:
        older = f"{hello.sender_id} names them the wrong way round"
    return (
        f"no wire version in common: {hello.role} {hello.sender_id} speaks "
        f"{hello.oldest_version} to {hello.newest_version}, the one it greeted "
        f"{OLDEST_WIRE_VERSION} to {WIRE_VERSION}; {older}"
    )


class MessageServer:
    """``on_message(peer, message)`` runs on the event loop and must not block."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        describe: Callable[[Hello, int], HelloReply],
        on_message: Callable[[Peer, AnyMessage], None],
    ) -> None:
        self._socket = context.socket(zmq.ROUTER)
        sockets.configure(self._socket)
        # A peer that lost its connection may be back before this side noticed the loss.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._describe = describe
        self._on_message = on_message
        self._peers: dict[str, Peer] = {}
        self._newest: dict[str, str] = {}
        self.num_dropped = 0

    def bind(self, host: str) -> str:
        return sockets.bind(self._socket, host)

    async def run(self) -> None:
        """Receive until cancelled; closes the socket."""
        turns = Turns()
        try:
            while True:
                self._receive(await self._socket.recv_multipart())
                await turns.take()
        finally:
            self._socket.close()

    def send(self, key: str, message: Message) -> bool:
        """False when that peer never said hello here. Never blocks: see ``sockets``."""
        if key not in self._peers:
            return False
        self._send(key.encode(), message)
        return True

    def send_to(self, sender_id: str, message: Message) -> bool:
        """To whichever incarnation of ``sender_id`` said hello last."""
        key = self._newest.get(sender_id)
        return key is not None and self.send(key, message)

    def peers(self, role: str) -> list[Peer]:
        return [peer for peer in self._peers.values() if peer.role == role]

    def _send(self, routing_id: bytes, message: Message) -> None:
        sent = self._socket.send_multipart([routing_id, encode(message)])
        assert isinstance(sent, asyncio.Future)
        assert sent.done(), "an unlimited queue accepts at once"

    def _receive(self, parts: list[bytes]) -> None:
        try:
            routing_id, message = parts[0], decode(_only_body(parts))
            key = routing_id.decode("ascii")
        except (WireError, UnicodeDecodeError) as exc:
            self._drop(f"dropped a message: {exc}")
            return
        if isinstance(message, Hello):
            self._greet(key, routing_id, message)
            return
        peer = self._peers.pop(key, None)
        if peer is not None:
            self._peers[key] = peer  # The first in line to be forgotten is the longest silent.
        else:
            self._drop("dropped a message that came before a hello")
            self._send(routing_id, _refuse(NOT_GREETED))
            return
        self._on_message(peer, message)

    def _greet(self, key: str, routing_id: bytes, hello: Hello) -> None:
        if key != peer_key(hello.sender_id, hello.incarnation):
            self._drop("dropped a hello that names another peer")
            return
        version = agree_on_version(hello)
        if not version:
            self._send(routing_id, _refuse(why_not(hello)))
            return
        older = self._newest.get(hello.sender_id)
        if older is not None and older != key:
            self.forget(older)
        if len(self._peers) >= MAX_PEERS and key not in self._peers:
            self.forget(next(iter(self._peers)))
        self._newest[hello.sender_id] = key
        self._peers[key] = Peer(hello.sender_id, hello.incarnation, hello.role, version)
        self._send(routing_id, self._describe(hello, version))

    def _drop(self, reason: str) -> None:
        self.num_dropped += 1
        if self.num_dropped & (self.num_dropped - 1) == 0:
            log.warning("%s (%d dropped so far)", reason, self.num_dropped)

    def forget(self, key: str) -> None:
        peer = self._peers.pop(key, None)
        if peer is not None and self._newest.get(peer.sender_id) == key:
            del self._newest[peer.sender_id]


def _only_body(parts: list[bytes]) -> bytes:
    if len(parts) != 2:
        raise WireError(f"a message has one part, this one {len(parts) - 1}")
    return parts[1]


def _refuse(reason: str) -> HelloReply:
    return HelloReply(reason, 0, "-", "-", "-")
