"""What the two ends of a hand-over ask of the shell around them."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.protocol.block_hash import EXACT
from baton.protocol.messages import KvFrame, Message, RequestBody, TransferEnd, WorkerRef


@dataclass(frozen=True, slots=True)
class ToDecode:
    """Send a message to a decode worker over its message link."""

    decode: WorkerRef
    message: Message


@dataclass(frozen=True, slots=True)
class PushKv:
    """Read tokens ``token_start ..`` out of the blocks and send them as frames, in order.

    The shell reads when the link has room, not now: the blocks stay the sender's until the
    transfer is over. Frames are numbered from ``first_index``.
    """

    decode: WorkerRef
    transfer_id: str
    epoch: int
    first_index: int
    block_table: tuple[int, ...]
    token_start: int
    num_tokens: int
    num_tokens_total: int
    layers: range
    version: int = 1
    codecs: tuple[str, ...] = ()
    """That may be used: both ends have them, and they keep the request's floor."""
    may_recompute: bool = False
    """Whether the decode side may be left to compute rows itself."""
    computed_at: float = field(default=0.0, compare=False)
    """When the rest of the prompt is expected to be computed."""


@dataclass(frozen=True, slots=True)
class PushEnd:
    decode: WorkerRef
    end: TransferEnd
    prefilled_at: float = 0.0


@dataclass(frozen=True, slots=True)
class CancelPush:
    """Forget what is queued for a transfer: its blocks are about to be someone else's."""

    transfer_id: str
    is_committed: bool = False


@dataclass(frozen=True, slots=True)
class ToPrefill:
    """Answer the prefill worker that asked, by its peer key."""

    peer_key: str
    message: Message


@dataclass(frozen=True, slots=True)
class WriteKv:
    """Decode the payload that came with ``frame`` and write it into these blocks, which stay the
    transfer's until ``Receiver.written`` is told of it."""

    frame: KvFrame
    block_table: tuple[int, ...]
    num_tokens_total: int


@dataclass(frozen=True, slots=True)
class SendClosed:
    """A transfer is over at the prefill end, its blocks are free. ``error_code`` "" is success."""

    transfer_id: str
    error_code: str = ""
    message: str = ""
    retryable: bool = False
    suspect: str = ""


@dataclass(frozen=True, slots=True)
class Arrived:
    """A transfer committed at the decode end: ``blocks`` (owned by its id) hold the KV."""

    transfer_id: str
    body: RequestBody
    token_ids: tuple[int, ...]
    """Drawn by the prefill side, and already on their way to the client."""
    blocks: tuple[int, ...]
    asked_at: float
    """When room was first asked for; the request's deadline counts from here."""
    reserve_wait_s: float
    transfer_s: float
    num_bytes: int
    num_frames: int
    transport: str = ""
    """That brought the last frame."""
    num_tokens: int = 0
    """Of the request's, those whose KV came; the rest is to be computed here."""
    complete_from: int = 0
    """Of those, the first whose rows came for all layers, and not only for some."""
    num_raw_bytes: int = 0
    """What ``num_bytes`` stand for."""
    codecs: dict[str, int] = field(default_factory=dict)
    """Payload bytes by codec."""
    quality: str = EXACT
    """The class of the KV that came (``block_hash``)."""
    exposed_s: float = 0.0
    """From the end of prefill to this, but for the way of the last message."""


SendInstruction = ToDecode | PushKv | PushEnd | CancelPush | SendClosed
ReceiveInstruction = ToPrefill | WriteKv | Arrived
