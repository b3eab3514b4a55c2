"""The prefill end of measured hand-overs: the product's pusher, codecs, controller and sockets.

All KV is there before the clock starts, as when prefill is over before the decode side has room.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Sequence
from itertools import count
from pathlib import Path

import msgspec
import numpy as np
import zmq
import zmq.asyncio

from baton.messaging.codec import decode, encode
from baton.protocol.layout import KvLayout
from baton.protocol.messages import (
    Granted,
    KvOffer,
    KvProgress,
    RequestBody,
    Reserve,
    TransferEnd,
    TransferNack,
    WorkerRef,
)
from baton.protocol.sampling import SamplingParams
from benchmarks.kv.far_end import Ready, Up
from benchmarks.kv.shaped_link import ShapedLink
from kv_transfer.codecs.contract import Array
from kv_transfer.coding import KvCoding
from kv_transfer.controller import Choice, CodecController, Rest
from kv_transfer.estimates import ComputeEstimate
from kv_transfer.frames import KV_VERSION, FrameCut, framings_of
from kv_transfer.instructions import PushEnd, PushKv
from kv_transfer.pusher import KvPusher
from kv_transfer.transports.make import make_sender

FRAME_BYTES = 1 << 20
DECODE = WorkerRef("far", "1", "tcp://127.0.0.1:1")
TIMEOUT_S = 60.0


class Fixed(CodecController):
    """Always the same choice."""

    def __init__(self, codec: str, compute: ComputeEstimate) -> None:
        super().__init__({}, compute=compute)
        self._codec = codec

    def choose(self, transfer_id: str, codecs: Sequence[str], rest: Rest, now: float) -> Choice:
        return Choice(self._codec, 0.0, {})


class NearEnd:
    """kv: of a whole prompt, ``[layers, 2, tokens, kv_heads, head_dim]``; token_ids: of it."""

    def __init__(
        self, coding: KvCoding, layout: KvLayout, kv: Array, token_ids: tuple[int, ...]
    ) -> None:
        self.coding = coding
        self._layout = layout
        self._kv = kv
        self._token_ids = token_ids
        self._framing = framings_of(layout)[KV_VERSION]
        self._context = zmq.asyncio.Context()
        self._answers = self._context.socket(zmq.PULL)
        self._asks = self._context.socket(zmq.PUSH)
        self._sender = make_sender("zeromq", self._context, FRAME_BYTES)
        self._pushers: dict[int, tuple[KvPusher, asyncio.Task[None]]] = {}
        self._current: KvPusher | None = None
        self._granted: asyncio.Future[Granted] | None = None
        self._ready: asyncio.Future[Ready] | None = None
        self._numbers = count(1)

    @contextlib.asynccontextmanager
    async def connected(self, link: ShapedLink, folder: Path) -> AsyncIterator[None]:
        port = self._answers.bind_to_random_port(f"tcp://{link.near}")
        address = f"tcp://{link.near}:{port}"
        module = [sys.executable, "-m", "benchmarks.kv.far_end"]
        command = [*link.prefix, *module, str(folder), link.far, address]
        process = await asyncio.create_subprocess_exec(*command)
        listening: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(TIMEOUT_S * 5):
                up = msgspec.json.decode(await self._answers.recv(), type=Up)
            self._asks.connect(up.asks_address)
            await self._sender.connect(KvOffer("zeromq", up.kv_address))
            listening = asyncio.create_task(self._listen())
            yield
            await self._asks.send(b"")
            async with asyncio.timeout(TIMEOUT_S):
                await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            tasks = [task for _, task in self._pushers.values()]
            for task in [*tasks, *([listening] if listening else [])]:
                task.cancel()
            self._sender.close()
            self._context.destroy(linger=0)

    async def hand_over(
        self, num_tokens: int, codecs: Sequence[str], controller: CodecController
    ) -> tuple[float, Ready]:
        """Seconds from having all KV here to being able to decode there."""
        loop = asyncio.get_running_loop()
        pusher = self._pusher(controller)
        transfer_id = f"t{next(self._numbers)}/0"
        self._granted, self._ready = loop.create_future(), loop.create_future()
        body = RequestBody(
            request_id=transfer_id[:-2],
            attempt=0,
            router_id="r",
            router_epoch=1,
            prompt_ids=self._token_ids[:num_tokens],
            output_ids=(),
            sampling=SamplingParams(max_tokens=8),
            priority=0,
            deadline_in_s=TIMEOUT_S,
        )
        fingerprint = self._framing.fingerprint
        ask = Reserve(transfer_id, "", body, KV_VERSION, fingerprint)
        await self._asks.send(encode(ask))
        async with asyncio.timeout(TIMEOUT_S):
            granted = await self._granted
            began = time.perf_counter()
            self._push(pusher, transfer_id, granted.epoch, num_tokens, tuple(codecs))
            ready = await self._ready
        seconds = time.perf_counter() - began
        pusher.cancel(transfer_id, is_committed=True)
        for first, stop, took in ready.computed:
            controller.compute.computed(first, stop, took)
        return seconds, ready

    def _push(
        self,
        pusher: KvPusher,
        transfer_id: str,
        epoch: int,
        num_tokens: int,
        codecs: tuple[str, ...],
    ) -> None:
        layers = range(self._layout.num_layers)
        cuts = self._framing.cuts(
            0, num_tokens, FRAME_BYTES, num_tokens_total=num_tokens, layers=layers
        )
        num_frames = sum(1 for _ in cuts)
        rows = PushKv(
            DECODE,
            transfer_id,
            epoch,
            0,
            (),
            0,
            num_tokens,
            num_tokens,
            layers,
            KV_VERSION,
            codecs,
            may_recompute=True,
        )
        end = TransferEnd(transfer_id, epoch, num_frames, num_tokens, (5,), KV_VERSION)
        pusher.put(rows)
        pusher.put(PushEnd(DECODE, end))

    def _pusher(self, controller: CodecController) -> KvPusher:
        """Each controller has its own, and they take turns on one link."""
        known = self._pushers.get(id(controller))
        if known is None:
            pusher = KvPusher(
                self._layout,
                FRAME_BYTES,
                self._read_kv,
                coding=self.coding,
                controller=controller,
            )
            task = asyncio.create_task(pusher.run(self._sender))
            known = self._pushers[id(controller)] = (pusher, task)
        self._current = known[0]
        return known[0]

    def _read_kv(
        self, block_table: tuple[int, ...], cut: FrameCut, room: memoryview | None
    ) -> memoryview:
        layers = slice(cut.layer_start, cut.layer_start + cut.num_layers)
        tokens = slice(cut.token_start, cut.token_start + cut.num_tokens)
        rows = np.ascontiguousarray(self._kv[layers, :, tokens])
        return rows.reshape(-1).view(np.uint8).data

    async def _listen(self) -> None:
        while True:
            data = await self._answers.recv()
            if data[:1] == b"{":
                assert self._ready is not None
                self._ready.set_result(msgspec.json.decode(data, type=Ready))
                continue
            message = decode(data)
            match message:
                case Granted():
                    assert self._granted is not None
                    self._granted.set_result(message)
                case KvProgress():
                    assert self._current is not None
                    self._current.progressed(message)
                case TransferNack():
                    raise AssertionError(message.reason)
