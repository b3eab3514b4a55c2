"""``cluster.process`` whose decode end says in its log how often it let KV in or refused it.

Only looked at: nothing is decided otherwise than in a worker as it is. ``read`` finds what was
said last.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import Any

import msgspec

from baton.protocol.messages import KvFrame, TransferEnd
from cluster import process
from decode_worker import service
from kv_transfer.instructions import ReceiveInstruction, WriteKv
from kv_transfer.receiver import Receiver

MARK = "KV witness: "

log = logging.getLogger(__name__)


class Counts(msgspec.Struct, frozen=True):
    """Of one incarnation of a decode worker, since its start.

    num_stale: frames and ends refused by their epoch. num_dead_frames: of those, frames.
    num_let_in: frames for which a write began.
    """

    num_stale: int = 0
    num_dead_frames: int = 0
    num_let_in: int = 0
    num_corrupt: int = 0
    num_committed: int = 0


class WatchedReceiver(Receiver):
    _told = Counts()
    _num_dead_frames = 0
    _num_let_in = 0
    _num_committed = 0

    def frame(
        self, frame: KvFrame, num_bytes: int, checksum: int, now: float, transport: str = ""
    ) -> list[ReceiveInstruction]:
        num_stale = self.num_stale
        instructions = super().frame(frame, num_bytes, checksum, now, transport)
        is_stale = self.num_stale > num_stale
        self._num_dead_frames += is_stale
        self._num_let_in += sum(isinstance(i, WriteKv) for i in instructions)
        assert not (is_stale and instructions), "something came of a stale frame"
        return instructions

    def end(self, end: TransferEnd, now: float) -> list[ReceiveInstruction]:
        is_open = end.transfer_id in self
        instructions = super().end(end, now)
        self._num_committed += is_open and end.transfer_id not in self
        return instructions

    def tick(self, now: float) -> list[ReceiveInstruction]:
        counts = Counts(
            self.num_stale,
            self._num_dead_frames,
            self._num_let_in,
            self.num_corrupt,
            self._num_committed,
        )
        if counts != self._told:
            self._told = counts
            log.info("%s%s", MARK, msgspec.json.encode(counts).decode())
        return super().tick(now)


def read(log_dir: Path, worker_id: str) -> Counts:
    """What that worker's log said last."""
    lines = (log_dir / f"{worker_id}.log").read_text().splitlines()
    said = [line.partition(MARK)[2] for line in lines if MARK in line]
    return msgspec.json.decode(said[-1], type=Counts) if said else Counts()


def main(argv: list[str]) -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    watched: Any = service
    watched.Receiver = WatchedReceiver
    asyncio.run(process._main(argv[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
