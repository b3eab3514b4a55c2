"""The decode end of measured hand-overs, as a process of its own.

    python -m benchmarks.kv.far_end MODEL_FOLDER OWN_HOST ANSWERS_ADDRESS

Messages go as between workers; ``Up`` comes before all of them, and ``Ready`` tells that a sequence
could be decoded.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from baton.engine.block_pool import BlockPool
from baton.messaging.codec import decode, encode
from baton.protocol.config import EngineConfig, KvTransferConfig
from baton.protocol.messages import Reserve, TransferEnd
from benchmarks.kv.prompt_kv import BLOCK_TOKENS, NUM_BLOCKS, compute, load
from decode_worker.decider import FrameArrived, KvWritten
from decode_worker.kv_input import KvInput
from kv_transfer.coding import KvCoding
from kv_transfer.instructions import Arrived, ReceiveInstruction, ToPrefill, WriteKv
from kv_transfer.puller import KvPuller
from kv_transfer.receiver import Receiver
from kv_transfer.transports.make import Receivers

ENGINE = EngineConfig(num_blocks=NUM_BLOCKS, block_size=BLOCK_TOKENS, watermark=0.0)


class Up(msgspec.Struct, frozen=True, tag=True):
    kv_address: str
    asks_address: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """num_kept: tokens whose KV came. computed: (first token, stop, seconds) of the others."""

    transfer_id: str
    num_kept: int
    computed: list[tuple[int, int, float]]


class FarEnd:
    def __init__(self, folder: Path, host: str, answers_address: str) -> None:
        self._executor = load(folder)
        self._coding = KvCoding.of_model(str(folder), self._executor.layout)
        names = self._coding.names("auto")
        self._coding.prepare(names)
        self._coding.wait_until_prepared()
        self._pool = BlockPool(NUM_BLOCKS, BLOCK_TOKENS)
        self._receiver = Receiver(
            self._pool,
            self._executor.layout,
            ENGINE,
            KvTransferConfig(),
            self._coding.qualities(names),
            self._coding.labels(names),
        )
        self._sending: set[asyncio.Future[zmq.MessageTracker | None]] = set()
        self._context = zmq.asyncio.Context()
        self._answers = self._context.socket(zmq.PUSH)
        self._answers.connect(answers_address)
        self._asks = self._context.socket(zmq.PULL)
        port = self._asks.bind_to_random_port(f"tcp://{host}")
        self._input = KvInput(self._executor, self._coding, self._feed, writes_beside=False)
        puller = KvPuller(self._input.on_frame, self._on_end)
        self._receivers = Receivers("zeromq", self._context, puller.handler)
        offers = self._receivers.bind(host)
        self._say(msgspec.json.encode(Up(offers[0].address, f"tcp://{host}:{port}")))

    async def run(self) -> None:
        """Until an empty ask."""
        receiving = asyncio.ensure_future(self._receivers.run())
        while data := await self._asks.recv():
            message = decode(data)
            assert isinstance(message, Reserve)
            now = time.monotonic()
            self._do(self._receiver.reserve("near", message, now))
            self._do(self._receiver.grant(1, now))
        receiving.cancel()
        await asyncio.wait([receiving])
        self._coding.close()
        self._context.destroy(linger=0)

    def _feed(self, event: object) -> None:
        now = time.monotonic()
        match event:
            case FrameArrived(frame, num_bytes, checksum, transport):
                self._do(self._receiver.frame(frame, num_bytes, checksum, now, transport))
            case KvWritten(frame, seconds, problem):
                self._do(self._receiver.written(frame, seconds, problem, now))

    def _on_end(self, end: TransferEnd) -> None:
        self._do(self._receiver.end(end, time.monotonic()))

    def _do(self, instructions: list[ReceiveInstruction]) -> None:
        for instruction in instructions:
            match instruction:
                case ToPrefill(_, message):
                    self._say(encode(message))
                case WriteKv():
                    self._input.accept(instruction)
                case Arrived():
                    self._arrived(instruction)

    def _arrived(self, arrived: Arrived) -> None:
        """Nothing else is to be done meanwhile: one hand-over at a time."""
        token_ids = arrived.body.prompt_ids
        chunks = compute(self._executor, token_ids, arrived.num_tokens, arrived.blocks)
        self._pool.release(arrived.transfer_id, arrived.blocks)
        ready = Ready(arrived.transfer_id, arrived.num_tokens, chunks)
        self._say(msgspec.json.encode(ready))

    def _say(self, data: bytes) -> None:
        sending = asyncio.ensure_future(self._answers.send(data))
        self._sending.add(sending)
        sending.add_done_callback(self._sending.discard)


async def main(folder: str, host: str, answers_address: str) -> None:
    await FarEnd(Path(folder), host, answers_address).run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
