"""Makes senders and receivers by the name that a configuration and an offer give them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq.asyncio

from baton.protocol.messages import KvOffer
from kv_transfer.transports import cuda_ipc, in_process, shared_memory, zeromq
from kv_transfer.transports.choose import AUTO, BEST_FIRST, FALLBACK
from kv_transfer.transports.contract import KvReceiver, KvSender, LinkLost, OnPart
from kv_transfer.transports.cuda_ipc import cuda_ipc_receiver, cuda_ipc_sender
from kv_transfer.transports.in_process import InProcessReceiver, InProcessSender
from kv_transfer.transports.shared_memory import (
    shared_memory_receiver,
    shared_memory_sender,
)
from kv_transfer.transports.torch_p2p import TorchReceiver, TorchSender
from kv_transfer.transports.zeromq import ZeroMqReceiver, ZeroMqSender


def make_sender(kind: str, context: zmq.asyncio.Context, max_frame_bytes: int) -> KvSender:
    """Raises LinkLost for a kind that is not known here: a newer peer's, say."""
    match kind:
        case in_process.KIND:
            return InProcessSender(max_frame_bytes)
        case shared_memory.KIND:
            return shared_memory_sender(max_frame_bytes)
        case zeromq.TCP | zeromq.IPC:
            return ZeroMqSender(context, kind, max_frame_bytes)
        case "gloo" | "nccl":
            return TorchSender(kind, max_frame_bytes)
        case cuda_ipc.KIND:
            return cuda_ipc_sender(max_frame_bytes)
    raise LinkLost(f"no transport {kind!r} here")


def make_receiver(kind: str, context: zmq.asyncio.Context, on_part: OnPart) -> KvReceiver:
    """Raises ConfigError for a kind that this machine has not."""
    match kind:
        case in_process.KIND:
            return InProcessReceiver(on_part)
        case shared_memory.KIND:
            return shared_memory_receiver(on_part)
        case zeromq.TCP | zeromq.IPC:
            return ZeroMqReceiver(context, kind, on_part)
        case "gloo" | "nccl":
            return TorchReceiver(kind, on_part)
        case cuda_ipc.KIND:
            return cuda_ipc_receiver(on_part)
    raise AssertionError(f"no transport {kind!r}")


class Receivers:
    """All ways by which KV may come to one worker: the wanted transport, and always ZeroMQ."""

    def __init__(
        self, wanted: str, context: zmq.asyncio.Context, handler: Callable[[str], OnPart]
    ) -> None:
        """handler: what takes the parts that come by a transport of that name."""
        kinds = BEST_FIRST if wanted == AUTO else dict.fromkeys((wanted, FALLBACK))
        self._receivers = [make_receiver(kind, context, handler(kind)) for kind in kinds]

    def bind(self, host: str) -> tuple[KvOffer, ...]:
        """Raises ConfigError."""
        return tuple(receiver.bind(host) for receiver in self._receivers)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for receiver in self._receivers:
                group.create_task(receiver.run(), name=f"KV by {receiver.kind}")

    @property
    def num_bytes(self) -> int:
        return sum(receiver.num_bytes for receiver in self._receivers)

    @property
    def num_dropped(self) -> int:
        return sum(receiver.num_dropped for receiver in self._receivers)

    def bytes_by_kind(self) -> dict[str, int]:
        """Of those that carried anything."""
        return {r.kind: r.num_bytes for r in self._receivers if r.num_bytes}

    def close(self) -> None:
        for receiver in self._receivers:
            receiver.close()
