"""A decode worker that cannot be one, or has other KV, costs its own requests, never the worker."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec
import pytest
import zmq.asyncio

from baton.messaging.link import make_hello
from baton.messaging.server import MessageServer
from baton.protocol.config import KvTransferConfig
from baton.protocol.layout import KvLayout
from baton.protocol.messages import HelloReply, TransferCancel, WorkerRef
from kv_transfer.transports.uplink import Uplink
from prefill_worker.links import DecodeLinks
from tests.conformance.kv_ends import until

LAYOUT = KvLayout.uniform(
    num_layers=1, num_kv_heads=1, head_dim=64, dtype="float32", model_digest="x"
)


Refused = list[tuple[WorkerRef, str]]


@contextlib.asynccontextmanager
async def linking() -> AsyncIterator[tuple[zmq.asyncio.Context, DecodeLinks, Refused]]:
    context = zmq.asyncio.Context()
    refused: Refused = []
    links = DecodeLinks(
        context,
        make_hello("p-0", "1", "prefill"),
        LAYOUT,
        KvTransferConfig(),
        lambda table, cut, room: memoryview(b""),
        on_message=lambda decode, message: None,
        on_refused=lambda decode, reason: refused.append((decode, reason)),
    )
    running = asyncio.get_running_loop().create_task(links.run())
    await asyncio.sleep(0)
    try:
        yield context, links, refused
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.wait([running])
        context.destroy(linger=0)


async def test_a_nonsense_address_is_refused_and_the_links_live_on():
    async with linking() as (_, links, refused):
        nonsense = WorkerRef("d-0", "1", "nonsense")
        links.send(nonsense, TransferCancel("r/0"), 0.0)
        assert [decode for decode, _ in refused] == [nonsense]
        assert "nonsense" in refused[0][1]


def greets(version: int, layout: KvLayout, *, says_it: bool) -> HelloReply:
    fingerprint = layout.fingerprint(version)
    reply = HelloReply("", version, "d-0", "1", "decode", fingerprint, "tcp://127.0.0.1:9")
    return msgspec.structs.replace(reply, layout=layout) if says_it else reply


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (greets(2, LAYOUT, says_it=True), ""),
        (greets(1, LAYOUT, says_it=False), ""),
        (
            greets(2, LAYOUT.with_dtype("float16"), says_it=True),
            "KV does not fit d-0: dtype float32 at the prefill end, float16 at the decode end; "
            "start both with one dtype",
        ),
        (
            greets(2, msgspec.structs.replace(LAYOUT, model_digest="y"), says_it=True),
            "KV does not fit d-0: model x at the prefill end, y at the decode end",
        ),
        (
            greets(1, LAYOUT.with_dtype("float16"), says_it=False),
            "KV does not fit d-0: model folder, dtype or version differ",
        ),
    ],
)
async def test_a_peer_with_other_kv_is_refused_at_the_hello(reply: HelloReply, reason: str):
    """Before anything that was put for it has gone."""
    async with linking() as (context, links, refused):
        server = MessageServer(context, lambda hello, version: reply, lambda peer, message: None)
        decode = WorkerRef("d-0", "1", server.bind("127.0.0.1"))
        serving = asyncio.get_running_loop().create_task(server.run())
        links.send(decode, TransferCancel("r/0"), 0.0)
        await until(lambda: refused or links._connections[decode].is_greeted, "answered")
        assert [said for _, said in refused] == ([reason] if reason else [])
        serving.cancel()
        await asyncio.wait([serving])


async def test_a_kv_link_that_breaks_costs_its_peer_and_nobody_else(monkeypatch):
    async def breaks(uplink: Uplink, offers: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Uplink, "open", breaks)
    async with linking() as (context, links, refused):
        reply = greets(2, LAYOUT, says_it=True)
        server = MessageServer(context, lambda hello, version: reply, lambda peer, message: None)
        decode = WorkerRef("d-0", "1", server.bind("127.0.0.1"))
        serving = asyncio.get_running_loop().create_task(server.run())
        links.send(decode, TransferCancel("r/0"), 0.0)
        await until(lambda: refused, "refused")
        await asyncio.sleep(0)
        ((who, reason),) = refused
        assert who == decode
        assert "Too many open files" in reason
        assert decode not in links._connections
        serving.cancel()
        await asyncio.wait([serving])
