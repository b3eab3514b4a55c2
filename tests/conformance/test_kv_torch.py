"""What only torch.distributed has: moves with deadlines, groups that hang, and their abort."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
import torch
import zmq.asyncio
from torch import Tensor

from baton.protocol.errors import ConfigError
from kv_transfer.transports import group_thread, pair_group, torch_p2p
from kv_transfer.transports.contract import LinkLost
from kv_transfer.transports.group_thread import GroupThread
from kv_transfer.transports.make import make_receiver, make_sender
from kv_transfer.transports.pair_group import PairGroup, find_store
from kv_transfer.transports.torch_p2p import _HELLO, _JOINED, _MAGIC, _PART, _READY, _WELCOME
from tests.conformance.kv_ends import (
    Ends,
    Received,
    bound,
    linked,
    lost,
    nothing_left,
    put,
    running,
    until,
    warm_up,
)

KIND = "gloo"


async def call(sock: socket.socket, data: bytes, num_bytes: int) -> bytes:
    """Send, and read an answer of that length; shorter when the other side hung up."""
    loop, answer = asyncio.get_running_loop(), b""
    async with asyncio.timeout(20.0):
        await loop.sock_sendall(sock, data)
        while len(answer) < num_bytes:
            try:
                read = await loop.sock_recv(sock, num_bytes - len(answer))
            except ConnectionResetError:
                break
            if not read:
                break
            answer += read
    return answer


async def knock(ends: Ends) -> socket.socket:
    host, _, port = ends.offer.address.rpartition(":")
    sock = socket.socket()
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
    return sock


@contextlib.asynccontextmanager
async def joined(ends: Ends) -> AsyncIterator[tuple[socket.socket, PairGroup]]:
    """A peer that has joined as a sender does, and does nothing by itself."""
    sock = await knock(ends)
    welcome = await call(sock, _HELLO.pack(_MAGIC, KIND.encode()), _WELCOME.size)
    port, name = _WELCOME.unpack(welcome)
    group = await asyncio.to_thread(
        lambda: PairGroup(KIND, find_store("127.0.0.1", port), name.hex(), 0, "127.0.0.1")
    )
    assert await call(sock, b"", 1) == _JOINED
    try:
        yield sock, group
    finally:
        await asyncio.to_thread(group.abort)
        sock.close()


async def test_a_payload_that_does_not_come_in_time_costs_the_link(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As of a sender that is stopped right there; what it sends after that reaches nobody."""
    await warm_up()
    monkeypatch.setattr(pair_group, "MOVE_DEADLINE_S", 0.3)
    async with linked(KIND) as (ends, sender):
        async with joined(ends) as (sock, group):
            assert await call(sock, _PART.pack(4, 1_000) + b"head", 1) == _READY
            assert await call(sock, b"", 1) == b"", "hung up on"
            with pytest.raises(RuntimeError):
                await asyncio.to_thread(group.send, torch.zeros(1_000, dtype=torch.uint8))
        assert ends.receiver.num_dropped == 1
        await put(sender, b"good", b"unharmed")
        await ends.end(sender)
        assert ends.received.parts == [(b"good", b"unharmed"), (b"end", None)]


async def test_a_receiver_that_does_not_take_what_it_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It hangs between the ready and its receive: the sender gives up within the deadline."""
    await warm_up()
    hanging = threading.Event()

    def hang(self: PairGroup, payload: Tensor) -> None:
        hanging.wait(20.0)
        raise RuntimeError("aborted")

    monkeypatch.setattr(pair_group, "MOVE_DEADLINE_S", 0.3)
    monkeypatch.setattr(PairGroup, "receive", hang)
    async with nothing_left(), linked(KIND) as (_, sender):
        await put(sender, b"head", b"x" * 1_000_000)
        assert "the gloo group failed" in (await lost(sender)).message
        hanging.set()


async def test_one_who_knocks_and_never_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    await warm_up()
    monkeypatch.setattr(torch_p2p, "CONNECT_DEADLINE_S", 0.3)
    monkeypatch.setattr(pair_group, "CONNECT_DEADLINE_S", 0.3)
    async with nothing_left(), bound(KIND) as ends, running(ends.receiver.run()):
        silent, half = await knock(ends), await knock(ends)
        assert len(await call(half, _HELLO.pack(_MAGIC, KIND.encode()), _WELCOME.size)) > 0
        for sock in (silent, half):
            assert await call(sock, b"", 1) == b""
            sock.close()
        assert ends.receiver.num_dropped == 2


@pytest.mark.parametrize(
    "hello",
    [b"GET / HTTP/1.1\r\n\r\n", _HELLO.pack(_MAGIC, b"nccl"), _HELLO.pack(b"other", b"gloo")],
)
async def test_a_stranger_is_hung_up_on_at_its_hello(hello: bytes) -> None:
    async with nothing_left(), linked(KIND) as (ends, sender):
        stranger = await knock(ends)
        assert await call(stranger, hello, 1) == b""
        stranger.close()
        assert ends.receiver.num_dropped == 1
        await put(sender, b"good", b"unharmed")
        await ends.end(sender)


@pytest.mark.parametrize(
    "record", [_PART.pack(2**32 - 1, 1), _PART.pack(0, 2**40), _PART.pack(0, -2)]
)
async def test_a_stranger_is_hung_up_on_at_a_broken_record(record: bytes) -> None:
    async with linked(KIND) as (ends, sender):
        async with joined(ends) as (sock, _):
            assert await call(sock, record, 1) == b""
        assert ends.receiver.num_dropped == 1
        await put(sender, b"good", b"unharmed")
        await ends.end(sender)


class HangingGroup:
    """As NCCL can be: its moves end with an abort only, and its abort may hang as well."""

    def __init__(self, *, abort_hangs: bool = False) -> None:
        self.is_aborted = threading.Event()
        self.may_end = threading.Event()
        self._abort_hangs = abort_hangs

    def send(self, payload: Tensor) -> None:
        self.is_aborted.wait(20.0)
        raise RuntimeError("aborted")

    def abort(self) -> None:
        if self._abort_hangs:
            self.may_end.wait(20.0)
        self.is_aborted.set()


async def test_a_hanging_move_ends_with_the_abort_and_holds_up_nobody() -> None:
    async with nothing_left():
        thread, group = GroupThread(), HangingGroup()
        await thread.join(lambda: cast(Any, group))
        move = thread.send(torch.zeros(1))
        thread.close()
        thread.close()
        async with asyncio.timeout(20.0):
            with pytest.raises(RuntimeError, match="aborted"):
                await move
        with pytest.raises(RuntimeError, match="closed"):
            thread.send(torch.zeros(1))


async def test_a_group_that_is_joined_too_late_is_aborted() -> None:
    async with nothing_left():
        thread, group, gate = GroupThread(), HangingGroup(), threading.Event()

        def late() -> PairGroup:
            gate.wait(20.0)
            return cast(Any, group)

        joining = thread.join(late)
        thread.close()
        gate.set()
        await joining
        assert group.is_aborted.is_set()


async def test_an_abort_that_hangs_is_told_and_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await warm_up()
    monkeypatch.setattr(group_thread, "ABORT_DEADLINE_S", 0.1)
    async with nothing_left():
        thread, group = GroupThread(), HangingGroup(abort_hangs=True)
        await thread.join(lambda: cast(Any, group))
        thread.close()
        await until(lambda: "abort hangs" in caplog.text, "the alarm")
        group.may_end.set()


async def test_a_backend_that_is_not_here_is_refused_by_name() -> None:
    if pair_group.is_available("nccl"):
        pytest.skip("this machine has NCCL")
    context = zmq.asyncio.Context()
    with pytest.raises(ConfigError, match="nccl is not available on this worker; set it to auto"):
        make_receiver("nccl", context, Received().on_part)
    sender = make_sender("nccl", context, 1_000)
    async with bound(KIND) as ends:
        with pytest.raises(LinkLost, match="nccl is not available here"):
            await sender.connect(ends.offer)
    context.destroy(linger=0)
