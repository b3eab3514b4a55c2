"""The sending end of one peer that is never without a way: the chosen transport, or ZeroMQ.

A link that is lost is made anew, as another incarnation of itself (a new ring, a new process
group), with ZeroMQ in the meantime. Frames that were on their way when the way changed may be
lost or overtake each other: the decode side then asks for all of that transfer again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from baton.protocol.errors import TransferFailed
from baton.protocol.messages import KvOffer
from kv_transfer.transports import in_process
from kv_transfer.transports.choose import AUTO, FALLBACK, WHY_AUTO, candidates, refused
from kv_transfer.transports.contract import KvSender, LinkLost

log = logging.getLogger(__name__)

RETRY_S, MAX_RETRY_S = 1.0, 30.0

MakeSender = Callable[[str], KvSender]


class Uplink:
    """A ``KvOutlet`` made of senders. ``open`` first; ``run`` beside the task that sends."""

    def __init__(self, peer: str, wanted: str, make: MakeSender) -> None:
        self.reason = "not connected"
        """Why it is this transport, for people."""
        self._peer = peer
        self._wanted = wanted
        self._make = make
        self._sender: KvSender | None = None
        self._chosen: KvOffer | None = None
        self._fallback: KvOffer | None = None
        self._remade: KvSender | None = None
        self._lost = asyncio.Event()
        self._is_closed = False
        self._closed_bytes: dict[str, int] = {}

    @property
    def kind(self) -> str:
        return "" if self._sender is None else self._sender.kind

    def bytes_by_kind(self) -> dict[str, int]:
        """Payload bytes sent, by transport."""
        counts = dict(self._closed_bytes)
        if self._sender is not None:
            counts[self._sender.kind] = counts.get(self._sender.kind, 0) + self._sender.num_bytes
        return counts

    async def open(self, offers: tuple[KvOffer, ...]) -> None:
        """Raises IncompatiblePeer when no wanted transport reaches the peer."""
        self._fallback = next((o for o in offers if o.transport == FALLBACK), None)
        failures: list[str] = []
        for offer in candidates(self._wanted, offers, self._peer):
            try:
                self._sender = await self._connected(offer)
            except LinkLost as exc:
                if offer.transport != in_process.KIND:  # Which goes without saying.
                    failures.append(exc.message)
                continue
            self._chosen = offer
            self.reason = "; ".join([*failures, self._why(offer)])
            return
        raise refused(self._wanted, self._peer, "; ".join(failures))

    def _why(self, offer: KvOffer) -> str:
        if self._wanted == AUTO:
            return WHY_AUTO[offer.transport]
        return f"asked for by kv_transfer.transport: {self._wanted}"

    async def _connected(self, offer: KvOffer) -> KvSender:
        sender = self._make(offer.transport)
        try:
            await sender.connect(offer)
            if self._is_closed:
                raise LinkLost("closed while it was connecting")
        except BaseException:
            sender.close()
            raise
        return sender

    async def room(self, num_bytes: int) -> memoryview | None:
        while True:
            sender = self._current()
            try:
                return await sender.room(num_bytes)
            except LinkLost as exc:
                await self._replace(sender, exc)

    async def send(self, head: bytes, payload: memoryview | None) -> None:
        while True:
            sender = self._current()
            try:
                return await sender.send(head, payload)
            except LinkLost as exc:
                await self._replace(sender, exc)

    def _current(self) -> KvSender:
        """A link that was made anew is taken up between two parts."""
        if self._sender is None:
            raise LinkLost(f"the KV link to {self._peer} is closed")
        if self._remade is not None:
            self._retire()
            self._sender, self._remade = self._remade, None
            assert self._chosen is not None
            self.reason = f"{self._why(self._chosen)} (made anew)"
        return self._sender

    async def _replace(self, lost: KvSender, exc: LinkLost) -> None:
        if self._sender is not lost:
            return
        if self._fallback is None or lost.kind == FALLBACK:
            raise TransferFailed(f"the KV link to {self._peer} is gone: {exc.message}") from exc
        log.warning("%s to %s: %s; ZeroMQ carries meanwhile", lost.kind, self._peer, exc.message)
        self._retire()
        self._sender = await self._connected(self._fallback)
        self.reason = f"{lost.kind} was lost ({exc.message}) and is being made anew"
        self._lost.set()

    async def run(self) -> None:
        """Make the chosen link anew whenever it was lost, until cancelled."""
        while True:
            await self._lost.wait()
            self._lost.clear()
            delay_s = RETRY_S
            while self._remade is None:
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, MAX_RETRY_S)
                assert self._chosen is not None
                try:
                    self._remade = await self._connected(self._chosen)
                except LinkLost as exc:
                    log.info("%s to %s: %s", self._chosen.transport, self._peer, exc.message)

    def _retire(self) -> None:
        """Close what sends now, and keep its count."""
        self._closed_bytes = self.bytes_by_kind()
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    def close(self) -> None:
        self._is_closed = True
        self._retire()
        if self._remade is not None:
            self._remade.close()
            self._remade = None
