"""Bytes that no protocol of ours wants, thrown at a port or at a ZeroMQ socket."""

from __future__ import annotations

import asyncio
import contextlib
import random

import msgpack
import zmq
import zmq.asyncio

TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 0.5


def blobs(seed: int) -> list[bytes]:
    rng = random.Random(seed)
    return [
        b"\x00",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(512),
        b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f" + rng.randbytes(64),
        rng.randbytes(10_000),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(500),
        b"[" * 100_000,
    ]


async def throw_bytes(port: int, seed: int) -> int:
    """Each blob over a TCP connection of its own; returns how many were delivered."""
    return sum(await asyncio.gather(*(_throw(port, blob) for blob in blobs(seed))))


async def _throw(port: int, blob: bytes) -> bool:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(blob)
        await writer.drain()
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await reader.read(1_024)
        writer.close()
    return True


def payloads(seed: int) -> list[list[bytes]]:
    """Well-formed ZeroMQ messages with nonsense in them."""
    rng = random.Random(seed)
    hello = msgpack.packb(["Hello", 1, 1, "ghost", "0", "router"])
    return [
        [b""],
        [rng.randbytes(100)],
        [msgpack.packb({"a": 1})],
        [msgpack.packb(["Dispatch"])],
        [msgpack.packb(["Dispatch", [1] * 9, None])],
        [msgpack.packb(["NoSuchMessage", 1])],
        [b"\x91" * 50_000],
        [b"\xdd\xff\xff\xff\xff"],
        [msgpack.packb(["Abort", "x" * 10_000, 0])],
        [hello, b"a second part", b"a third"],
        [msgpack.packb(["TokenAck", [["nobody", 0, 2**63]]])],
        [
            msgpack.packb(["KvFrame", "nobody/0", 1, "f", 0, 0, 1, 0, 1, "raw", 4, 0]),
            b"abcd",
        ],
        [msgpack.packb(["TransferEnd", "nobody/0", 1, 1, 1, [1]])],
    ]


async def throw_messages(address: str, kind: int, seed: int, *, greet: bool) -> int:
    """``kind``: zmq.DEALER for a message port, zmq.PUSH for a KV port. With ``greet`` the
    nonsense comes from a peer that said a proper hello first."""
    context = zmq.asyncio.Context()
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 1_000)
    if kind == zmq.DEALER:
        socket.setsockopt(zmq.ROUTING_ID, b"ghost|0")
    num_sent = 0
    try:
        socket.connect(address)
        if greet:
            await socket.send(msgpack.packb(["Hello", 1, 1, "ghost", "0", "router"]))
            async with asyncio.timeout(TIMEOUT_S):
                answer = msgpack.unpackb(await socket.recv())
            assert answer[0] == "HelloReply", answer
        for parts in payloads(seed):
            await socket.send_multipart(parts)
            num_sent += 1
    finally:
        socket.close()
        context.term()
    return num_sent
