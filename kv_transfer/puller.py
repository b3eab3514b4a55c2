"""What arrives over any transport, as frames and ends. Knows no transport."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from baton.messaging.codec import decode
from baton.protocol.errors import WireError
from baton.protocol.messages import KvFrame, TransferEnd
from kv_transfer.frames import frame_checksum
from kv_transfer.transports.contract import OnPart

log = logging.getLogger(__name__)


OnFrame = Callable[[KvFrame, memoryview, int, str], Awaitable[None]]
"""(frame, payload, ``frame_checksum`` of what arrived, transport). The payload is its until it
returns; of one sender one is awaited after the other."""


class KvPuller:
    """Calls ``on_frame`` and ``on_end`` in the order of arrival per sender."""

    def __init__(
        self,
        on_frame: OnFrame,
        on_end: Callable[[TransferEnd], None],
    ) -> None:
        self._on_frame = on_frame
        self._on_end = on_end
        self.num_dropped = 0

    def handler(self, transport: str) -> OnPart:
        """What takes the parts that come by that transport."""

        async def on_part(head: memoryview, payload: memoryview | None) -> None:
            try:
                await self._part(transport, head, payload)
            except WireError as exc:
                self.num_dropped += 1
                if self.num_dropped & (self.num_dropped - 1) == 0:
                    log.warning("dropped KV: %s (%d so far)", exc, self.num_dropped)

        return on_part

    async def _part(self, transport: str, head: memoryview, payload: memoryview | None) -> None:
        message = decode(head)
        if isinstance(message, TransferEnd) and payload is None:
            self._on_end(message)
        elif isinstance(message, KvFrame) and payload is not None:
            await self._on_frame(message, payload, frame_checksum(message, payload), transport)
        else:
            what = "no payload" if payload is None else "a payload"
            raise WireError(f"{type(message).__name__} with {what} on a KV link")
