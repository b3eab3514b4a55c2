"""What of one hand-over has gone to the link, and whether that is all that will. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from baton.protocol.messages import TransferEnd
from kv_transfer.frames import FrameCut, Framing


@dataclass(slots=True)
class SentRows:
    """Of one epoch. Once ``stop`` was called no more frames go: the other end has the KV of the
    first ``num_kept`` tokens, and computes the rest from tokens."""

    framing: Framing
    epoch: int
    num_tokens_total: int
    num_frames: int = 0
    num_bytes: int = 0
    """As they are, not coded."""
    is_stopped: bool = False
    _begun: list[int] = field(init=False)
    _sent: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._begun = self.framing.needed_from(self.num_tokens_total)
        self._sent = list(self._begun)

    def add(self, cut: FrameCut) -> None:
        for layer in range(cut.layer_start, cut.layer_start + cut.num_layers):
            self._sent[layer] = cut.token_start + cut.num_tokens
        self.num_frames += 1
        self.num_bytes += self.framing.num_bytes(cut)

    @property
    def num_bytes_total(self) -> int:
        framing = self.framing
        return sum(
            (self.num_tokens_total - first) * framing.row_bytes(framing.group_of(layer))
            for layer, first in enumerate(self._begun)
        )

    @property
    def num_kept(self) -> int:
        """Leading tokens with which the other end can go on. Where layers see only the newest
        tokens, their older rows were not sent, and nothing but all of it will do."""
        is_whole = min(self._sent) == self.num_tokens_total
        return min(self._sent) if is_whole or not any(self._begun) else 0

    def stop(self) -> None:
        self.is_stopped = True

    def cut_short(self, end: TransferEnd) -> TransferEnd:
        """Not sealed."""
        if not self.is_stopped:
            return end
        return msgspec.structs.replace(end, num_frames=self.num_frames, num_tokens=self.num_kept)
