"""Which transports are worth trying towards a peer, best first, and what to say of it. Pure.

Nearness is not guessed from names: each candidate is tried, and one that works only near by
(``in_process``, ``shared_memory``) proves with its connection that the peer is that near.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.protocol.errors import IncompatiblePeer
from baton.protocol.messages import HelloReply, KvOffer
from kv_transfer.transports import in_process, shared_memory, zeromq

AUTO = "auto"
FALLBACK = zeromq.TCP
"""Carries while a better link is being made anew; every worker offers it."""
NEAR = (in_process.KIND, shared_memory.KIND)
"""What copies as fast as any window could tell."""

BEST_FIRST = (in_process.KIND, shared_memory.KIND, zeromq.TCP)
"""What ``auto`` tries. Others are used where they are asked for by name."""

WHY_AUTO = {
    in_process.KIND: "both ends are in one process",
    shared_memory.KIND: "same host: the peer answered on a socket of this kernel",
    zeromq.TCP: "nothing nearer reaches the peer",
}


def offers_of(reply: HelloReply) -> tuple[KvOffer, ...]:
    """A peer of wire version 1 offers ZeroMQ alone, in ``kv_address``."""
    if reply.kv_offers or not reply.kv_address:
        return reply.kv_offers
    return (KvOffer(zeromq.TCP, reply.kv_address),)


def candidates(wanted: str, offers: Sequence[KvOffer], peer: str) -> list[KvOffer]:
    """Offers to try, in order. Raises IncompatiblePeer where none will do."""
    kinds = BEST_FIRST if wanted == AUTO else (wanted,)
    found = [offer for kind in kinds for offer in offers if offer.transport == kind]
    if not found:
        offered = ", ".join(offer.transport for offer in offers) or "nothing"
        raise refused(wanted, peer, f"it offers {offered}")
    return found


def refused(wanted: str, peer: str, why: str) -> IncompatiblePeer:
    way_out = "" if wanted == AUTO else "; set kv_transfer.transport to auto or to zeromq"
    return IncompatiblePeer(f"no KV link to {peer} by {wanted}: {why}{way_out}")
