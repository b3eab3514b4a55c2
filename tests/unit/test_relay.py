"""The relay of the tests leaves no connection behind, whenever it ends."""

from __future__ import annotations

import asyncio
import gc
import socket

import pytest

from tests.support.relay import relay_to


@pytest.mark.parametrize("num_turns", range(8))
async def test_connections_accepted_while_it_ends_are_closed(num_turns: int) -> None:
    """At each turn of the loop between accepting and carrying; nobody listens at the target."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{unused.getsockname()[1]}"
        clients = [socket.socket() for _ in range(3)]
        try:
            async with relay_to(target) as relay:
                host, port = relay.address.split(":")
                for client in clients:
                    client.connect((host, int(port)))
                for _ in range(num_turns):
                    await asyncio.sleep(0)
            for _ in range(4):  # What was accepted last is told of its connection after that.
                await asyncio.sleep(0)
            gc.collect()
        finally:
            for client in clients:
                client.close()
