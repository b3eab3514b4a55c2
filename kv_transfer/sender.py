"""The prefill end of all hand-overs of one worker. Pure.

Room is asked for when the first chunk is scheduled. Rows go as soon as room is granted and
they are final: layer after layer of a chunk, where the shell tells of layers. The source
blocks are freed on an acknowledgement, a refusal or an abort - never by a timer. They are only
read, and frames carry copies, so freeing them needs no fencing: ``CancelPush`` makes the shell
forget what it has not read yet, and throw away what it is just reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

import msgspec

from baton.protocol.config import KvTransferConfig
from baton.protocol.layout import KvLayout
from baton.protocol.lifecycle import SEND_TRANSITIONS, Machine, SendEvent, SendState
from baton.protocol.messages import (
    Denied,
    Granted,
    KvProgress,
    LeaseRenew,
    RequestBody,
    Reserve,
    TransferAck,
    TransferCancel,
    TransferEnd,
    TransferNack,
    WorkerRef,
)
from kv_transfer.blocks import Blocks
from kv_transfer.codecs.contract import Quality
from kv_transfer.floors import allowed, floor_of, may_recompute
from kv_transfer.frames import KV_VERSION, RAW, end_checksum, framings_of
from kv_transfer.instructions import (
    CancelPush,
    PushEnd,
    PushKv,
    SendClosed,
    SendInstruction,
    ToDecode,
)
from kv_transfer.overlap import HIDDEN_PART, PushRate, StepRate, parts_of

RENEWALS_PER_LEASE = 3
NO_LABELS: Mapping[str, str] = {}
EXACT_ALONE: Mapping[str, Quality] = {RAW: Quality.EXACT}


@dataclass(slots=True)
class _Outgoing:
    """``owner`` names this transfer in the block pool once prefill has ended."""

    machine: Machine[SendState, SendEvent]
    decode: WorkerRef
    num_tokens: int
    owner: str
    floor: Quality
    computed: list[int]
    """By layer: leading tokens whose KV is final."""
    sent: list[int]
    """By layer: of those, the ones that were given to the link in this epoch."""
    block_table: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    prefilled_at: float = 0.0
    epoch: int = 0
    version: int = 1
    codecs: tuple[str, ...] = (RAW,)
    num_frames: int = 0
    num_resends: int = 0
    ended_at: float = 0.0


class Sender:
    """``handle``-style methods: each takes an event and ``now``, returns instructions."""

    def __init__(
        self,
        pool: Blocks,
        layout: KvLayout,
        config: KvTransferConfig,
        codecs: Mapping[str, Quality] = EXACT_ALONE,
        labels: Mapping[str, str] = NO_LABELS,
    ) -> None:
        """codecs: those that this side may use, with ``raw``. labels: see ``KvCoding``."""
        self._pool = pool
        self._layout = layout
        self._framings = framings_of(layout)
        self._config = config
        self._codecs = codecs
        self._labels = labels
        self._steps = StepRate()
        self._open: dict[str, _Outgoing] = {}
        self._rates: dict[WorkerRef, PushRate] = {}
        self._renew_at = 0.0
        self.num_parked = 0

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def num_layers(self) -> int:
        return self._layout.num_layers

    def __contains__(self, transfer_id: str) -> bool:
        return transfer_id in self._open

    def begin(
        self, transfer_id: str, decode: WorkerRef, body: RequestBody, now: float
    ) -> list[SendInstruction]:
        """The first chunk of the prompt was scheduled: ask for room."""
        assert transfer_id not in self._open
        self._open[transfer_id] = _Outgoing(
            machine=Machine(transfer_id, SEND_TRANSITIONS, SendState.RESERVING, now),
            decode=decode,
            num_tokens=len(body.prompt_ids) + len(body.output_ids),
            owner=owner_name(transfer_id),
            floor=floor_of(body.kv_quality, self._config.quality_floor),
            computed=[0] * self._layout.num_layers,
            sent=[0] * self._layout.num_layers,
        )
        oldest, newest = self._framings.get(1), self._framings[KV_VERSION]
        ask = Reserve(
            transfer_id,
            "" if oldest is None else oldest.fingerprint,
            body,
            KV_VERSION,
            newest.fingerprint,
        )
        return [ToDecode(decode, ask)]

    def computed(
        self, transfer_id: str, block_table: tuple[int, ...], num_computed: int, now: float
    ) -> list[SendInstruction]:
        """KV of the first ``num_computed`` tokens is final and stays where it is."""
        return self.layers_computed(
            transfer_id, block_table, num_computed, self._layout.num_layers, now
        )

    def layers_computed(
        self,
        transfer_id: str,
        block_table: tuple[int, ...],
        num_computed: int,
        num_layers: int,
        now: float,
    ) -> list[SendInstruction]:
        """As ``computed``, of the first ``num_layers`` layers."""
        out = self._open[transfer_id]
        out.block_table = block_table
        for layer in range(num_layers):
            out.computed[layer] = max(out.computed[layer], num_computed)
        return self._push(transfer_id, out, now)

    def ran(self, num_tokens: int, seconds: float) -> None:
        """A step is over."""
        self._steps.ran(num_tokens, seconds)

    def parts(
        self, transfer_id: str, num_tokens: int, num_step_tokens: int, *, is_last: bool
    ) -> int:
        """In how many parts of layers a chunk of its prompt is best sent, that a step of so many
        tokens computes. is_last: what follows it waits for it."""
        out = self._open[transfer_id]
        rate = self._rates.get(out.decode)
        compute_s = self._steps.seconds_per_token * num_step_tokens
        if rate is None or not rate.bytes_per_s or not compute_s:
            return 1
        link_s = num_tokens * self._layout.bytes_per_token / rate.bytes_per_s
        if not is_last and rate.backlog_s + link_s < HIDDEN_PART * compute_s:
            # The next step hides it. A link that is slower than that must not stand idle, though.
            return 1
        return parts_of(self._layout.num_layers, compute_s, link_s, backlog_s=rate.backlog_s)

    def progressed(self, message: KvProgress, now: float) -> None:
        out = self._open.get(message.transfer_id)
        if out is not None and out.epoch == message.epoch:
            self._rate(out).written(message.transfer_id, message.num_frames, now)

    def _rate(self, out: _Outgoing) -> PushRate:
        return self._rates.setdefault(out.decode, PushRate())

    def prefill_done(
        self, transfer_id: str, token_ids: tuple[int, ...], now: float
    ) -> list[SendInstruction]:
        """All KV is computed; its blocks now belong to ``owner_name(transfer_id)``."""
        out = self._open[transfer_id]
        assert min(out.computed) == out.num_tokens
        out.token_ids, out.prefilled_at = token_ids, now
        if out.machine.move(SendEvent.PREFILL_DONE, now) is SendState.PARKED:
            self.num_parked += 1
        return self._push(transfer_id, out, now)

    def granted(self, message: Granted, peer: WorkerRef, now: float) -> list[SendInstruction]:
        out = self._open.get(message.transfer_id)
        if out is None:
            return [ToDecode(peer, TransferCancel(message.transfer_id))]
        if not out.machine.allows(SendEvent.GRANTED):
            return []
        if message.version not in self._framings:
            reason = f"KV version {message.version} was granted, asked was {KV_VERSION}"
            return self._fail(message.transfer_id, out, reason, now)
        out.machine.move(SendEvent.GRANTED, now)
        out.epoch, out.version = message.epoch, message.version
        out.codecs = tuple(
            name
            for name in allowed(self._codecs, out.floor)
            if name == RAW or self._labels.get(name, name) in message.codecs
        )
        return self._push(message.transfer_id, out, now)

    def nacked(self, message: TransferNack, now: float) -> list[SendInstruction]:
        out = self._open.get(message.transfer_id)
        if (
            out is None
            or out.epoch != message.dead_epoch
            or not out.machine.allows(SendEvent.NACKED)
        ):
            return []
        out.num_resends += 1
        if out.num_resends > self._config.max_resends:
            reason = f"{message.reason}; sent {out.num_resends} times"
            return self._fail(message.transfer_id, out, reason, now)
        out.machine.move(SendEvent.NACKED, now)
        out.epoch = message.epoch
        out.num_frames = 0
        self._rate(out).closed(message.transfer_id)
        out.sent = [0] * len(out.sent)
        return [CancelPush(message.transfer_id), *self._push(message.transfer_id, out, now)]

    def _fail(
        self, transfer_id: str, out: _Outgoing, reason: str, now: float
    ) -> list[SendInstruction]:
        suspect = out.decode.worker_id
        closed = SendClosed(transfer_id, "transfer_failed", reason, True, suspect)
        return [
            ToDecode(out.decode, TransferCancel(transfer_id)),
            *self._close(transfer_id, SendEvent.FAIL, now, closed),
        ]

    def acked(self, message: TransferAck, now: float) -> list[SendInstruction]:
        out = self._open.get(message.transfer_id)
        if out is None or out.epoch != message.epoch or not out.machine.allows(SendEvent.ACK):
            return []
        self._rate(out).written(message.transfer_id, out.num_frames, now)
        return self._close(message.transfer_id, SendEvent.ACK, now, SendClosed(message.transfer_id))

    def denied(self, message: Denied, now: float) -> list[SendInstruction]:
        out = self._open.get(message.transfer_id)
        if out is None:
            return []
        closed = SendClosed(
            message.transfer_id,
            message.code,
            message.message,
            message.retryable,
            suspect=out.decode.worker_id if message.retryable else "",
        )
        return self._close(message.transfer_id, SendEvent.FAIL, now, closed)

    def refused(self, decode: WorkerRef, reason: str, now: float) -> list[SendInstruction]:
        """That decode worker refused our hello: nothing will ever be sent to it."""
        doomed = [t for t, out in self._open.items() if out.decode == decode]
        instructions = [
            instruction
            for transfer_id in doomed
            for instruction in self.denied(
                Denied(transfer_id, "incompatible_peer", reason, True), now
            )
        ]
        self._rates.pop(decode, None)
        return instructions

    def cancel(self, transfer_id: str, now: float) -> list[SendInstruction]:
        """Idempotent. No SendClosed comes of it: the caller knows."""
        out = self._open.get(transfer_id)
        if out is None:
            return []
        cancel = ToDecode(out.decode, TransferCancel(transfer_id))
        return [cancel, *self._close(transfer_id, SendEvent.ABORT, now, None)]

    def tick(self, now: float) -> list[SendInstruction]:
        """Renew the leases of all that is open, a few times within each lease.

        An end that was not answered for a whole lease is said again: the end or its answer
        may have been lost with a connection.
        """
        if now < self._renew_at or not self._open:
            return []
        self._renew_at = now + self._config.lease_s / RENEWALS_PER_LEASE
        by_decode: dict[WorkerRef, list[str]] = {}
        for transfer_id, out in self._open.items():
            by_decode.setdefault(out.decode, []).append(transfer_id)
        instructions: list[SendInstruction] = [
            ToDecode(decode, LeaseRenew(tuple(ids))) for decode, ids in by_decode.items()
        ]
        for transfer_id, out in self._open.items():
            if (
                out.machine.state is SendState.FLUSHING
                and now - out.ended_at > self._config.lease_s
            ):
                instructions += self._push(transfer_id, out, now)
        return instructions

    def _push(self, transfer_id: str, out: _Outgoing, now: float) -> list[SendInstruction]:
        if out.machine.state not in (SendState.STREAMING, SendState.FLUSHING):
            return []
        instructions: list[SendInstruction] = [*self._rows(transfer_id, out, now)]
        if out.machine.state is SendState.FLUSHING:
            end = TransferEnd(
                transfer_id,
                out.epoch,
                out.num_frames,
                out.num_tokens,
                out.token_ids,
                out.version,
            )
            end = msgspec.structs.replace(end, checksum=end_checksum(end))
            out.ended_at = now
            instructions.append(PushEnd(out.decode, end, out.prefilled_at))
        return instructions

    def _rows(self, transfer_id: str, out: _Outgoing, now: float) -> Iterator[PushKv]:
        """What is final and not sent, as rectangles: neighbouring layers at one place."""
        framing = self._framings[out.version]
        num_left = out.num_tokens - min(out.computed)
        computed_at = now + self._steps.seconds_per_token * num_left
        may_leave = (
            out.version > 1
            and self._config.codec == "auto"
            and may_recompute(out.floor, is_deterministic=bool(self._layout.arithmetic))
        )
        places = list(zip(out.sent, out.computed, strict=True))
        layer = 0
        for (sent, computed), same in groupby(places):
            layers = range(layer, layer + len(list(same)))
            layer = layers.stop
            if sent == computed:
                continue
            cuts = framing.cuts(
                sent,
                computed - sent,
                self._config.max_frame_bytes,
                num_tokens_total=out.num_tokens,
                layers=layers,
            )
            sizes = [framing.num_bytes(cut) for cut in cuts]
            if sizes:
                self._rate(out).pushed(transfer_id, out.num_frames, sizes, now)
                yield PushKv(
                    out.decode,
                    transfer_id,
                    out.epoch,
                    out.num_frames,
                    out.block_table,
                    sent,
                    computed - sent,
                    out.num_tokens,
                    layers,
                    out.version,
                    out.codecs,
                    may_leave,
                    computed_at,
                )
            out.num_frames += len(sizes)
        out.sent = list(out.computed)

    def _close(
        self, transfer_id: str, event: SendEvent, now: float, closed: SendClosed | None
    ) -> list[SendInstruction]:
        out = self._open[transfer_id]
        holds_blocks = out.machine.state in (SendState.PARKED, SendState.FLUSHING)
        out.machine.move(event, now)
        del self._open[transfer_id]
        self._rate(out).closed(transfer_id)
        if holds_blocks:
            self._pool.release(out.owner, out.block_table)
        is_committed = event is SendEvent.ACK
        cancel: list[SendInstruction] = [CancelPush(transfer_id, is_committed)]
        return cancel if closed is None else [*cancel, closed]


def owner_name(transfer_id: str) -> str:
    """The name under which a transfer holds its source blocks after prefill."""
    return f"{transfer_id}#send"
