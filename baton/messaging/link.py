"""The connecting end of the message plane: one link to one server, greeted with a hello."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

import msgspec
import zmq
import zmq.asyncio

from baton.messaging import sockets
from baton.messaging.codec import decode, encode
from baton.messaging.server import NOT_GREETED, peer_key
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

MAX_PENDING_MESSAGES = 16_384


class Link:
    """Messages sent before the hello is answered wait (bounded) and go out in order after it.

    ``on_reply`` sees every HelloReply, refusals included; ``on_message`` all else. Both run
    on the event loop and must not block.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        address: str,
        hello: Hello,
        on_message: Callable[[AnyMessage], None],
        on_reply: Callable[[HelloReply], None] | None = None,
    ) -> None:
        self.address = address
        self.is_ready = False
        self.version = 0
        """That is spoken; 0 before the hello is answered."""
        self._hello = hello
        self._on_message = on_message
        self._on_reply = on_reply
        self._pending: deque[Message] = deque()
        self._socket = context.socket(zmq.DEALER)
        sockets.configure(self._socket)
        self._socket.setsockopt(
            zmq.ROUTING_ID, peer_key(hello.sender_id, hello.incarnation).encode("ascii")
        )

    def connect(self) -> None:
        """Raises WireError for an address that cannot be one, and then the socket is closed."""
        try:
            sockets.connect(self._socket, self.address)
        except WireError:
            self._socket.close()
            raise

    async def run(self) -> None:
        """Greet and receive until cancelled; closes the socket. ``connect`` comes first."""
        turns = Turns()
        try:
            self._send(self._hello)
            while not self._socket.closed:
                self._receive(await self._socket.recv_multipart())
                await turns.take()
        finally:
            self._socket.close()

    def close(self) -> None:
        """Idempotent. A task that is cancelled before its first turn never reaches ``run``, so
        cancelling alone could leave the socket open."""
        self._socket.close()

    def send(self, message: Message) -> bool:
        """False when the peer has not answered and too much is waiting already."""
        if self.is_ready:
            self._send(message)
            return True
        if len(self._pending) >= MAX_PENDING_MESSAGES:
            return False
        self._pending.append(message)
        return True

    def _send(self, message: Message) -> None:
        sent = self._socket.send_multipart([encode(message)])
        assert isinstance(sent, asyncio.Future)
        assert sent.done(), "an unlimited queue accepts at once"

    def _receive(self, parts: list[bytes]) -> None:
        try:
            if len(parts) != 1:
                raise WireError(f"a message has one part, this one {len(parts)}")
            message = decode(parts[0])
        except WireError as exc:
            log.warning("dropped a message from %s: %s", self.address, exc)
            return
        if not isinstance(message, HelloReply):
            self._on_message(message)
            return
        if message.refusal == NOT_GREETED:
            self.is_ready = False
            self._send(self._hello)
            return
        message = self._checked(message)
        self.is_ready, self.version = not message.refusal, message.version
        while self.is_ready and self._pending:
            self._send(self._pending.popleft())
        if self._on_reply is not None:
            self._on_reply(message)

    def _checked(self, reply: HelloReply) -> HelloReply:
        """A peer must not speak what was not offered to it."""
        oldest, newest = self._hello.oldest_version, self._hello.newest_version
        if reply.refusal or oldest <= reply.version <= newest:
            return reply
        reason = (
            f"{reply.worker_id} wants to speak wire version {reply.version}; "
            f"{oldest} to {newest} were offered"
        )
        return msgspec.structs.replace(reply, refusal=reason, version=0)


def make_hello(sender_id: str, incarnation: str, role: str) -> Hello:
    return Hello(OLDEST_WIRE_VERSION, WIRE_VERSION, sender_id, incarnation, role)
