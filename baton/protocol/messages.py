"""Every message between router, prefill workers and decode workers.

Structs are positional on the wire (``[tag, field, field, ...]``) and only grow at the end,
with a default. ``baton.messaging.codec`` packs and validates them.

Wire versions:
  1  first release
  2  KV in groups of layers, coded by a codec per frame, with credits (``kv_transfer.frames``)
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from baton.protocol.layout import KvLayout
from baton.protocol.sampling import SamplingParams, TokenLogprobs

WIRE_VERSION = 2
OLDEST_WIRE_VERSION = 1
"""N and N-1 speak together (the lower is spoken); others are refused in the hello."""

MAX_PROMPT_TOKENS = 1_048_576
MAX_BATCH_ITEMS = 65_536
MAX_KV_LINKS = 256

Id = Annotated[str, Meta(min_length=1, max_length=192)]
Text = Annotated[str, Meta(max_length=4_096)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
Checksum = Annotated[int, Meta(ge=0)]
"""Up to 64 bits; MessagePack has no more."""
Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
"""Whether it is in the vocabulary is for the receiver to check; libraries take it as int32."""
TokenIds = Annotated[tuple[TokenId, ...], Meta(max_length=MAX_PROMPT_TOKENS)]


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all; the class name is the tag."""


class Hello(Message, frozen=True):
    """First message on every link, from the side that connects. Its shape never changes."""

    oldest_version: Count
    newest_version: Count
    sender_id: Id
    incarnation: Id
    role: Id


class KvOffer(msgspec.Struct, frozen=True, array_like=True):
    """A way by which KV may come to a worker. ``address`` is the transport's own affair."""

    transport: Id
    address: Text
    public_key: Text = ""
    """Of CURVE, where the link is encrypted."""


class HelloReply(Message, frozen=True):
    """``refusal`` is empty when the link is accepted; the rest then describes the worker.

    version: that is spoken, the lower of the newest of both. layout_fingerprint: as that version
    has it; from version 2 on ``layout`` says what is behind it.
    """

    refusal: Text
    version: Count
    worker_id: Id
    incarnation: Id
    role: Id
    layout_fingerprint: Text = ""
    kv_address: Text = ""
    """Of ZeroMQ, for peers that know no ``kv_offers``."""
    capacity_tokens: Count = 0
    """The longest request (prompt and output) that the KV pool can hold."""
    kv_offers: Annotated[tuple[KvOffer, ...], Meta(max_length=16)] = ()
    layout: KvLayout | None = None


class WorkerRef(msgspec.Struct, frozen=True, array_like=True):
    worker_id: Id
    incarnation: Id
    address: Text


class RequestBody(msgspec.Struct, frozen=True, array_like=True):
    """What any worker must know to run, or run again, a request.

    output_ids: tokens that its client already has; generation goes on behind them.
    deadline_in_s: time left when the message was sent; clocks are not shared.
    """

    request_id: Id
    attempt: Count
    router_id: Id
    router_epoch: Count
    prompt_ids: TokenIds
    output_ids: TokenIds
    sampling: SamplingParams
    priority: int
    deadline_in_s: Seconds
    tenant: Text = ""
    """Requests share cached prompts within one tenant only."""
    kv_quality: Text = ""
    """The floor of what a hand-over may do to its KV, one of ``block_hash.KV_FLOORS``; "" is the
    cluster's."""


class Dispatch(Message, frozen=True):
    """Router to worker. ``decode`` is None where the receiver runs both phases."""

    body: RequestBody
    decode: WorkerRef | None


class Abort(Message, frozen=True):
    """Router to worker, idempotent: drop this attempt and all older ones."""

    request_id: Id
    attempt: Count


class HopTimes(msgspec.Struct, frozen=True, array_like=True):
    """Durations that one worker measured, for the request's timeline."""

    queued_s: Seconds = 0.0
    prefill_s: Seconds = 0.0
    num_chunks: Count = 0
    reserve_wait_s: Seconds = 0.0
    """Decode side: from being asked for room to granting it."""
    transfer_s: Seconds = 0.0
    """Decode side: first frame to commit."""
    transfer_bytes: Count = 0
    transfer_frames: Count = 0
    codec: Text = ""
    transport: Text = ""
    preemptions: Count = 0
    first_step_s: Seconds = 0.0
    """Decode side: commit to this token."""
    transfer_raw_bytes: Count = 0
    """What ``transfer_bytes`` stand for."""
    exposed_s: Seconds = 0.0
    """From the end of prefill to commit, but for the way of the last message."""
    recomputed_tokens: Count = 0
    """Decode side: of the prompt, whose KV did not come but was computed there."""


class TokenItem(msgspec.Struct, frozen=True, array_like=True):
    """One or more new tokens of one request; ``seq`` is the completion position of the first.

    finish_reason: "" while it runs, else "stop" or "length"; stop_token_id tells which id
    ended it (-1: none, or EOS).
    """

    request_id: Id
    attempt: Count
    seq: Count
    token_ids: TokenIds
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: Text = ""
    stop_token_id: int = -1
    hop: HopTimes | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """With the first token, where asked: of the prompt's tokens behind its first."""


class TokenBatch(Message, frozen=True):
    """Worker to router: all of one step for that router, in one message."""

    worker_id: Id
    incarnation: Id
    items: Annotated[tuple[TokenItem, ...], Meta(max_length=MAX_BATCH_ITEMS)]


class TokenAckItem(msgspec.Struct, frozen=True, array_like=True):
    request_id: Id
    attempt: Count
    next_seq: Count


class TokenAck(Message, frozen=True):
    """Router to worker: everything below ``next_seq`` has arrived."""

    items: Annotated[tuple[TokenAckItem, ...], Meta(max_length=MAX_BATCH_ITEMS)]


class RequestFailed(Message, frozen=True):
    """Worker to router. ``suspect`` names the worker to avoid at the next attempt, or ""."""

    request_id: Id
    attempt: Count
    code: Id
    message: Text
    retryable: bool
    hop: Text
    suspect: Text


class HeldAttempt(msgspec.Struct, frozen=True, array_like=True):
    request_id: Id
    attempt: Count


class RouterAlive(Message, frozen=True):
    """Router to worker, once a second: requests of a silent router are aborted.

    attempts: what this worker should have; it answers RequestFailed for those it has not.
    """

    router_epoch: Count
    attempts: Annotated[tuple[HeldAttempt, ...], Meta(max_length=MAX_BATCH_ITEMS)] = ()


class KvLink(msgspec.Struct, frozen=True, array_like=True):
    """What carries KV between this worker and a peer.

    peer: the decode worker that it is sent to; "" for all that comes in by one transport.
    reason: why it is that transport, for people; "" where the peer chose.
    """

    peer: Text
    transport: Text
    reason: Text
    num_bytes: Count
    codecs: Text = ""
    """Where they are chosen: frames by choice, for people."""
    bytes_per_s: Count = 0
    """Of the link, as estimated; coded bytes."""
    num_predicted: Count = 0
    """Hand-overs whose end was predicted when they began to be sent."""
    predicted_s: Seconds = 0.0
    actual_s: Seconds = 0.0
    error_s: Seconds = 0.0
    """Sum of what predictions were off by."""


class LoadReport(Message, frozen=True):
    """Worker to router, a few times a second; its absence is how a loss is noticed."""

    worker_id: Id
    incarnation: Id
    role: Id
    num_running: Count
    num_waiting: Count
    num_waiting_tokens: Count
    num_blocks: Count
    num_free_blocks: Count
    block_size: Count
    num_transfers: Count
    num_parked: Count
    """Prompts whose prefill ended before the decode side had room, since start."""
    num_preemptions: Count
    num_backpressured: Count
    """Steps at which a waiting prompt did not fit, reservations that had to wait; since start."""
    kv_bytes_sent: Count
    kv_bytes_received: Count
    kv_transport: Text
    num_leases: Count
    num_tasks: Count
    step_count: Count
    integrity_errors: tuple[Text, ...] = ()
    num_swapped_out: Count = 0
    """Of the preemptions, those whose KV went to host memory; since start."""
    num_cache_queried_tokens: Count = 0
    """Tokens of admitted sequences that were looked up in the prefix cache; since start."""
    num_cache_hit_tokens: Count = 0
    num_draft_tokens: Count = 0
    """Tokens that were guessed and verified; since start."""
    num_accepted_draft_tokens: Count = 0
    kv_links: Annotated[tuple[KvLink, ...], Meta(max_length=MAX_KV_LINKS)] = ()
    """That are open, or carried anything since start; the first MAX_KV_LINKS of them."""


class Reserve(Message, frozen=True):
    """Prefill to decode, when the first chunk is scheduled: ask for room.

    fingerprint: of the layout as wire version 1 has it, "" where that cannot express it; from
    version 2 on ``layout`` is its own.
    version: the newest that the prefill side speaks.
    """

    transfer_id: Id
    fingerprint: Text
    body: RequestBody
    version: Count = 1
    layout: Text = ""


class Granted(Message, frozen=True):
    """Decode to prefill: room for the KV is held. Frames must carry ``epoch`` and ``version``,
    and be coded by one of ``codecs`` or raw."""

    transfer_id: Id
    epoch: Count
    lease_s: Seconds
    version: Count = 1
    codecs: Annotated[tuple[Text, ...], Meta(max_length=64)] = ()


class Denied(Message, frozen=True):
    """Decode to prefill: this hand-over will never be taken."""

    transfer_id: Id
    code: Id
    message: Text
    retryable: bool


class KvFrame(Message, frozen=True):
    """Header of one frame on the KV link; the payload is the next part of the message.

    The payload is ``[num_layers, 2, num_tokens, kv_heads, head_dim]``, C-contiguous, coded
    by ``codec``; "raw" is the array's own bytes. ``num_bytes`` is the payload's length.
    ``checksum`` is CRC-32 of the payload in version 1, and XXH3 over the other fields and the
    payload from version 2 on.
    """

    transfer_id: Id
    epoch: Count
    fingerprint: Text
    index: Count
    layer_start: Count
    num_layers: Count
    token_start: Count
    num_tokens: Count
    codec: Text
    num_bytes: Count
    checksum: Checksum
    version: Count = 1
    group: Count = 0
    """Of the layout, to which all of the frame's layers belong."""


class TransferEnd(Message, frozen=True):
    """On the KV link behind the last frame of an epoch. ``token_ids``: drawn by prefill.

    num_tokens: leading tokens whose KV came. From version 2 on it may be fewer than all: the
    decode side computes the rest, and ``checksum`` is XXH3 over the other fields.
    """

    transfer_id: Id
    epoch: Count
    num_frames: Count
    num_tokens: Count
    token_ids: TokenIds
    version: Count = 1
    checksum: Checksum = 0
    lag_s: Seconds = 0.0
    """From the end of prefill to sending this."""


class TransferAck(Message, frozen=True):
    """Decode to prefill: committed; the source blocks may go."""

    transfer_id: Id
    epoch: Count


class TransferNack(Message, frozen=True):
    """Decode to prefill: frames of ``dead_epoch`` are void, send all again under ``epoch``."""

    transfer_id: Id
    dead_epoch: Count
    epoch: Count
    reason: Text


class KvProgress(Message, frozen=True):
    """Decode to prefill, from version 2 on: what of an epoch has been written, in all.

    Said after frames and again with the answer to a renewal, so that a lost one costs nothing.
    decode_s: time that decoding and writing these bytes took.
    """

    transfer_id: Id
    epoch: Count
    num_frames: Count
    num_bytes: Count
    decode_s: Seconds


class TransferCancel(Message, frozen=True):
    """Prefill to decode, idempotent: nothing (more) will come."""

    transfer_id: Id


class LeaseRenew(Message, frozen=True):
    """Prefill to decode: these hand-overs are alive on my side."""

    transfer_ids: Annotated[tuple[Id, ...], Meta(max_length=MAX_BATCH_ITEMS)]


AnyMessage = (
    Hello
    | HelloReply
    | Dispatch
    | Abort
    | TokenBatch
    | TokenAck
    | RequestFailed
    | RouterAlive
    | LoadReport
    | Reserve
    | Granted
    | Denied
    | KvFrame
    | TransferEnd
    | TransferAck
    | TransferNack
    | KvProgress
    | TransferCancel
    | LeaseRenew
)
