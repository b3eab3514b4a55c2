"""The decode worker of ``benchmarks.kv_overlap``, behind a link as slow as it is told.

Prints where it listens, as JSON, and reads rates in bytes a second, one a line; ends with its
standard input.
"""

from __future__ import annotations

import asyncio
import json
import sys

import msgspec

from baton.checkpoint.find import resolve
from baton.engine.executor import Executor
from baton.protocol.clock import MonotonicClock
from baton.protocol.spec import WorkerSpec
from decode_worker.service import DecodeService
from tests.support.pacer import Pacer

UNPACED = 1e12


class PacedDecode(DecodeService):
    """Offers the pacer's address in place of its own."""

    def bind(self) -> str:
        address = super().bind()
        [offer] = [o for o in self._kv_offers if o.transport == "zeromq"]
        self.pacer = Pacer(offer.address, UNPACED)
        paced = msgspec.structs.replace(offer, address=f"tcp://{self.pacer.address}")
        self._kv_offers = (paced,)
        return address


async def main() -> None:
    spec = msgspec.json.decode(sys.argv[1], type=WorkerSpec)
    engine = spec.pool.engine
    executor = Executor.load(
        resolve(spec.model.path),
        dtype=spec.model.dtype,
        device="cpu",
        num_blocks=engine.num_blocks,
        block_size=engine.block_size,
        num_threads=1,
    )
    service = PacedDecode(spec, "bench-d", executor, MonotonicClock())
    print(json.dumps({"address": service.bind()}), flush=True)
    loop = asyncio.get_running_loop()
    serving = loop.create_task(service.run())
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        service.pacer.bytes_per_s = float(line)
    serving.cancel()
    await asyncio.wait([serving])
    service.pacer.close()


if __name__ == "__main__":
    asyncio.run(main())
