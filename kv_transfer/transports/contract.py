"""What every KV transport does: parts of (head, payload) from one sender to one receiver.

A part is a head (bytes, at most MAX_HEAD_BYTES) and, or not, a payload. The rules, which
``tests/conformance`` runs against each transport:

- Parts of one sender arrive once and in order, as long as its link holds. A link that breaks
  may lose what was on its way, even silently (ZeroMQ connects again by itself): the protocol
  above counts frames, and sends them again under a new epoch.
- A slow reader is felt: ``room`` and ``send`` wait once ``window_bytes`` are on their way.
- Sender: ``room`` and then ``send``, from one task. ``room(n)`` may give memory of the
  transport's own; a payload written there travels without a copy. Asked again before ``send``,
  it gives the same memory, so that nothing need be given back. Other payloads may travel
  without a copy too: their memory is never written again after ``send`` took it.
- Receiver: ``on_part`` is awaited, one part after the other for each sender; the payload is
  valid until it returns and must not be written to.
- ``close`` at any moment, from any state, also twice: nothing more is sent, what has not
  arrived is lost, and no task, thread, socket, descriptor or shared memory stays behind.
- A peer's death is a link that breaks. It leaves nothing behind either.
- What comes in is not trusted: a peer that breaks the transport's own format loses its link,
  is counted in ``num_dropped``, and costs no other peer anything.

Who writes into whose memory, and what keeps a writer out whose time is over, stands at the
head of each transport.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from baton.messaging.codec import MAX_MESSAGE_BYTES
from baton.protocol.errors import TransferFailed
from baton.protocol.messages import KvOffer

MAX_HEAD_BYTES = MAX_MESSAGE_BYTES
QUEUE_FRAMES = 4
"""Payloads that are on their way at one time, where the transport counts them itself."""
CONNECT_DEADLINE_S = 10.0

OnPart = Callable[[memoryview, memoryview | None], Awaitable[None]]


class LinkLost(TransferFailed):
    """This sender is of no more use; its owner closes it and makes another."""


class KvOutlet(Protocol):
    """Where parts for one peer go."""

    @property
    def kind(self) -> str:
        """Of the transport that takes the next part."""
        ...

    async def room(self, num_bytes: int) -> memoryview | None:
        """Wait until one more payload of at most ``num_bytes`` can go. Raises LinkLost.

        Memory of exactly ``num_bytes`` where the transport has its own, else None.
        """
        ...

    async def send(self, head: bytes, payload: memoryview | None) -> None:
        """Returns when the transport has taken the part. Raises LinkLost."""
        ...


class KvSender(KvOutlet, Protocol):
    """One peer's link. Not bound to a thread, but used from one event loop at a time."""

    @property
    def num_bytes(self) -> int:
        """Of payloads sent."""
        ...

    @property
    def window_bytes(self) -> int:
        """The most payload bytes that can be on their way, in buffers that Baton has a say in."""
        ...

    async def connect(self, offer: KvOffer) -> None:
        """Once. Raises LinkLost when the offer leads nowhere from here, within
        CONNECT_DEADLINE_S; ZeroMQ cannot tell, and raises for a malformed address only."""
        ...

    def close(self) -> None: ...


class KvReceiver(Protocol):
    """The end that many peers send to."""

    @property
    def kind(self) -> str: ...

    @property
    def num_bytes(self) -> int:
        """Of payloads that arrived."""
        ...

    @property
    def num_dropped(self) -> int: ...

    def bind(self, host: str) -> KvOffer:
        """Listen, before ``run``. Raises ConfigError when ``host`` cannot be bound."""
        ...

    async def run(self) -> None:
        """Receive until cancelled, then close."""
        ...

    def close(self) -> None:
        """For a task that was cancelled before its first turn never reached ``run``."""
        ...
