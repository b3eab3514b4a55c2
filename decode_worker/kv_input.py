"""What arrives on the KV links, into the cache: let in by the decider, written, and told of.

Raw frames are copied on the event loop: that takes less than a hop to another thread and back.
Coded ones, and all of a model split over ranks, are decoded and written beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from baton.protocol.errors import WireError
from baton.protocol.messages import KvFrame
from decode_worker.decider import FrameArrived, KvWritten
from kv_transfer.codecs.contract import Bytes
from kv_transfer.coding import KvCoding
from kv_transfer.frames import RAW, FrameCut
from kv_transfer.instructions import WriteKv
from kv_transfer.transports.choose import NEAR


class KvStore(Protocol):
    def write_kv(
        self,
        block_table: tuple[int, ...],
        start: int,
        num_tokens: int,
        layer_start: int,
        num_layers: int,
        payload: Bytes,
    ) -> None: ...


class KvInput:
    """feed: gives the decider an event; ``accept`` is called within it for a frame let in.
    writes_beside: a write may wait for others than this process. codecs: those that peers may
    want once KV comes over a network."""

    def __init__(
        self,
        store: KvStore,
        coding: KvCoding,
        feed: Callable[[object], None],
        *,
        writes_beside: bool,
        codecs: Sequence[str] = (),
    ) -> None:
        self._store = store
        self._coding = coding
        self._feed = feed
        self._writes_beside = writes_beside
        self._codecs = codecs
        self._accepted: WriteKv | None = None

    def accept(self, write: WriteKv) -> None:
        self._accepted = write

    async def on_frame(
        self, frame: KvFrame, payload: memoryview, checksum: int, transport: str
    ) -> None:
        """Returns when the payload is needed no more."""
        if transport not in NEAR:
            self._coding.prepare(self._codecs)
        self._accepted = None
        self._feed(FrameArrived(frame, payload.nbytes, checksum, transport))
        write, self._accepted = self._accepted, None
        if write is None:
            return
        began = time.perf_counter()
        problem = "its write was broken off"
        try:
            if frame.codec == RAW and not self._writes_beside:
                self._store_kv(write, payload)
            else:
                await self._coding.run(partial(self._decode, write, payload))
            problem = ""
        except WireError as exc:
            problem = exc.message
        finally:
            # Also for a link that closed meanwhile: the blocks wait for this.
            self._feed(KvWritten(frame, time.perf_counter() - began, problem))

    def _decode(self, write: WriteKv, payload: memoryview) -> None:
        """Raises WireError."""
        frame = write.frame
        if frame.codec != RAW:
            cut = FrameCut(
                frame.layer_start,
                frame.num_layers,
                frame.token_start,
                frame.num_tokens,
                frame.group,
            )
            payload = self._coding.decode(frame.codec, payload, cut, write.num_tokens_total)
        self._store_kv(write, payload)

    def _store_kv(self, write: WriteKv, payload: Bytes) -> None:
        frame = write.frame
        self._store.write_kv(
            write.block_table,
            frame.token_start,
            frame.num_tokens,
            frame.layer_start,
            frame.num_layers,
            payload,
        )
