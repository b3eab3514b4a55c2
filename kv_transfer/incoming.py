"""One hand-over at the decode end: what it holds, and how its epochs end. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.protocol.lifecycle import Machine, ReceiveEvent, ReceiveState
from baton.protocol.messages import KvProgress, RequestBody, TransferEnd
from kv_transfer.frames import Coverage, Framing, end_checksum


@dataclass(slots=True)
class Incoming:
    """``epoch`` is refused in VOID and FENCING, and while it is 0."""

    machine: Machine[ReceiveState, ReceiveEvent]
    body: RequestBody
    peer_key: str
    framing: Framing
    codecs: frozenset[str]
    asked_at: float
    renewed_at: float
    coverage: Coverage = field(init=False)
    granted_at: float = 0.0
    first_frame_at: float | None = None
    epoch: int = 0
    blocks: tuple[int, ...] = ()
    transport: str = ""
    num_writing: int = 0
    """Frames whose write may be running; of one epoch only."""
    num_written: int = 0
    written_bytes: int = 0
    decode_s: float = 0.0
    end: TransferEnd | None = None
    """Fits, and waits for the last write."""
    ended_at: float = 0.0
    reason: str = ""
    """Why its epoch is void."""

    def __post_init__(self) -> None:
        self.begin_epoch(0)

    @property
    def num_tokens(self) -> int:
        return len(self.body.prompt_ids) + len(self.body.output_ids)

    @property
    def state(self) -> ReceiveState:
        return self.machine.state

    def begin_epoch(self, epoch: int) -> None:
        assert not self.num_writing
        self.epoch = epoch
        self.coverage = Coverage(self.framing, self.num_tokens, self.codecs)
        self.num_written = self.written_bytes = 0
        self.decode_s = 0.0
        self.end = None

    def progress(self) -> KvProgress:
        return KvProgress(
            self.body_id, self.epoch, self.num_written, self.written_bytes, self.decode_s
        )

    @property
    def body_id(self) -> str:
        return self.machine.ident

    def misfit(self, end: TransferEnd) -> str:
        """Why that end does not go with what came; "" when it does."""
        coverage, version = self.coverage, self.framing.version
        if end.version != version or end.checksum != end_checksum(end):
            return f"the end of version {end.version} and checksum {end.checksum:#x} is damaged"
        is_covered = end.num_tokens <= self.num_tokens and coverage.covers(end.num_tokens)
        may_be_short = version > 1
        if (
            not is_covered
            or (end.num_tokens != self.num_tokens and not may_be_short)
            or end.num_frames != coverage.num_frames
            or len(end.token_ids) != 1
        ):
            return (
                f"{coverage.num_frames} of {end.num_frames} frames, {self.num_tokens} of "
                f"{end.num_tokens} tokens, {len(end.token_ids)} drawn at the end"
            )
        return ""
