"""A decode address that cannot be one costs its own request, never the worker."""

from __future__ import annotations

import asyncio

import zmq.asyncio

from baton.messaging.link import make_hello
from baton.protocol.layout import KvLayout
from baton.protocol.messages import TransferCancel, WorkerRef
from prefill_worker.links import DecodeLinks

LAYOUT = KvLayout.uniform(
    num_layers=1, num_kv_heads=1, head_dim=64, dtype="float32", model_digest="x"
)


async def test_a_nonsense_address_is_refused_and_the_links_live_on():
    context = zmq.asyncio.Context()
    refused: list[tuple[WorkerRef, str]] = []
    links = DecodeLinks(
        context,
        make_hello("p-0", "1", "prefill"),
        LAYOUT,
        4_096,
        lambda table, cut: memoryview(b""),
        on_message=lambda decode, message: None,
        on_refused=lambda decode, reason: refused.append((decode, reason)),
    )
    running = asyncio.get_running_loop().create_task(links.run())
    await asyncio.sleep(0)
    nonsense = WorkerRef("d-0", "1", "nonsense")
    links.send(nonsense, TransferCancel("r/0"), 0.0)
    assert [decode for decode, _ in refused] == [nonsense]
    assert "nonsense" in refused[0][1]
    assert not running.done()
    running.cancel()
    await asyncio.wait([running])
    context.destroy(linger=0)
