"""The other end of a KV link in a process of its own, to be killed, stopped or closed.

``python -m tests.conformance.kv_peer receive KIND`` prints its offer, then the heads that come.
``... send KIND TRANSPORT ADDRESS FRAME_BYTES`` prints a line, then sends frames for ever: head
the number, payload that number in each 8 bytes.
"""

from __future__ import annotations

import asyncio
import struct
import sys

import msgspec
import zmq.asyncio

from baton.protocol.messages import KvOffer
from tests.conformance.kv_ends import put, receiver_of, sender_of


async def receive(kind: str) -> None:
    async def on_part(head: memoryview, payload: memoryview | None) -> None:
        if payload is not None:
            check(bytes(head), payload)
        print(bytes(head).decode(), flush=True)

    receiver = receiver_of(kind, zmq.asyncio.Context(), on_part)
    print(msgspec.json.encode(receiver.bind("127.0.0.1")).decode(), flush=True)
    await receiver.run()


async def send(kind: str, offer: KvOffer, frame_bytes: int) -> None:
    sender = sender_of(kind, zmq.asyncio.Context(), frame_bytes)
    await sender.connect(offer)
    print("connected", flush=True)
    number = 0
    while True:
        await put(sender, b"%d" % number, frame(number, frame_bytes))
        number += 1


def frame(number: int, frame_bytes: int) -> bytes:
    return struct.pack("<Q", number) * (frame_bytes // 8)


def check(head: bytes, payload: memoryview) -> None:
    """Raises AssertionError for a payload that is not this head's."""
    assert bytes(payload) == frame(int(head), payload.nbytes), head


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        asyncio.run(receive(sys.argv[2]))
    else:
        asyncio.run(send(sys.argv[2], KvOffer(sys.argv[3], sys.argv[4]), int(sys.argv[5])))
