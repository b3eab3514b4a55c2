"""The decode end of all hand-overs of one worker. Pure.

A reservation waits until its blocks fit, holds them under a lease that the prefill side
renews, and lets frames in under an epoch. What was let in is written beside the event loop:
``written`` tells when. A lease that runs out ends the transfer: its id and epoch are refused
from then on. That and the end of the last write are the fence behind which blocks are reused.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Mapping

from baton.protocol.config import EngineConfig, KvTransferConfig
from baton.protocol.errors import WireError
from baton.protocol.layout import KvLayout
from baton.protocol.lifecycle import RECEIVE_TRANSITIONS, Machine, ReceiveEvent, ReceiveState
from baton.protocol.messages import (
    Denied,
    Granted,
    KvFrame,
    LeaseRenew,
    Message,
    RequestBody,
    Reserve,
    TransferAck,
    TransferEnd,
    TransferNack,
)
from kv_transfer.blocks import Blocks
from kv_transfer.codecs.contract import Quality
from kv_transfer.floors import quality_class
from kv_transfer.frames import KV_VERSION, RAW, Framing, framings_of
from kv_transfer.incoming import Incoming
from kv_transfer.instructions import Arrived, ReceiveInstruction, ToPrefill, WriteKv

NO_OTHERS: Mapping[str, Quality] = {}
NO_LABELS: Mapping[str, str] = {}
MAX_WAITING = 8_192
MAX_REMEMBERED = 4_096


class Receiver:
    """codecs: those that can be decoded here, ``raw`` aside. labels: see ``KvCoding``. is_ready:
    whether one may be asked for by now."""

    def __init__(
        self,
        pool: Blocks,
        layout: KvLayout,
        engine: EngineConfig,
        config: KvTransferConfig,
        codecs: Mapping[str, Quality] = NO_OTHERS,
        labels: Mapping[str, str] = NO_LABELS,
        is_ready: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self._pool = pool
        self._framings = framings_of(layout)
        self._qualities = {RAW: Quality.EXACT, **codecs}
        self._codecs = frozenset(self._qualities)
        self._labels = {name: labels.get(name, name) for name in self._codecs}
        self._is_ready = is_ready
        self._engine = engine
        self._config = config
        self._open: dict[str, Incoming] = {}
        self._fencing: dict[str, Incoming] = {}
        """Over, but for writes that may be running."""
        self._waiting: list[tuple[tuple[int, int], str]] = []
        self._committed: OrderedDict[str, tuple[int, str]] = OrderedDict()
        """The last transfers that committed: (epoch, peer key)."""
        self._num_asked = 0
        self._next_epoch = 1
        self._watermark_blocks = int(engine.watermark * pool.num_blocks)
        self._blocked_id = ""
        self.num_blocked = 0
        """Reservations that had to wait for blocks."""
        self.num_corrupt = 0
        self.num_stale = 0

    @property
    def num_open(self) -> int:
        """With those that only wait for the end of a write."""
        return len(self._open) + len(self._fencing)

    def __contains__(self, transfer_id: str) -> bool:
        return transfer_id in self._open

    @property
    def num_reserved(self) -> int:
        return sum(t.state is not ReceiveState.WAITING for t in self._open.values())

    def reserve(self, peer_key: str, ask: Reserve, now: float) -> list[ReceiveInstruction]:
        """Idempotent; an answer comes at once only when it is no. ``grant`` says yes."""
        known = (self._open, self._committed, self._fencing)
        if any(ask.transfer_id in where for where in known):
            return []
        body = ask.body
        framing = self._framing(ask)
        refusal = self._refusal(ask, framing)
        if refusal is not None:
            return [ToPrefill(peer_key, refusal)]
        assert framing is not None
        self._open[ask.transfer_id] = Incoming(
            machine=Machine(ask.transfer_id, RECEIVE_TRANSITIONS, ReceiveState.WAITING, now),
            body=body,
            peer_key=peer_key,
            framing=framing,
            codecs=self._codecs if framing.version > 1 else frozenset({RAW}),
            asked_at=now,
            renewed_at=now,
        )
        self._num_asked += 1
        if len(self._waiting) > 2 * len(self._open) + 64:
            # Behind one that waits for long, those that gave up would pile up.
            self._waiting = [entry for entry in self._waiting if self._waits(entry[1])]
            heapq.heapify(self._waiting)
        heapq.heappush(self._waiting, ((body.priority, self._num_asked), ask.transfer_id))
        return []

    def _framing(self, ask: Reserve) -> Framing | None:
        """In the lower of both sides' versions; None where both do not have one layout."""
        framing = self._framings.get(min(max(ask.version, 1), KV_VERSION))
        said = ask.layout if ask.version > 1 else ask.fingerprint
        return framing if framing is not None and framing.fingerprint == said else None

    def _refusal(self, ask: Reserve, framing: Framing | None) -> Denied | None:
        num_tokens = len(ask.body.prompt_ids) + len(ask.body.output_ids)
        if framing is None:
            said = f"{ask.layout or ask.fingerprint} (KV version {ask.version})"
            mine = ", ".join(f"{f.fingerprint} ({v})" for v, f in self._framings.items())
            message = f"KV layout {said} differs from this worker's: {mine}"
            return Denied(ask.transfer_id, "incompatible_peer", message, False)
        if self._pool.blocks_for(num_tokens + 1) > self._pool.num_blocks:
            message = f"{num_tokens} tokens never fit into {self._pool.num_blocks} KV blocks"
            return Denied(ask.transfer_id, "invalid_request", message, False)
        if len(self._open) >= MAX_WAITING:
            message = f"{MAX_WAITING} hand-overs are open here"
            return Denied(ask.transfer_id, "overloaded", message, True)
        return None

    def grant(self, num_seats: int, now: float) -> list[ReceiveInstruction]:
        """Give room to those that waited longest, most urgent first.

        num_seats: how many more sequences may join the batch. Room is the prompt plus the
        growth that its ``max_tokens`` allows, at most ``growth_tokens``; the watermark
        stays free as long as anything else holds blocks.
        """
        instructions: list[ReceiveInstruction] = []
        seats = num_seats - self.num_reserved
        while seats > 0 and (head := self._peek()) is not None:
            transfer_id, incoming = head
            body = incoming.body
            growth = min(
                self._engine.growth_tokens, body.sampling.max_tokens - len(body.output_ids)
            )
            need = self._pool.blocks_for(incoming.num_tokens + max(1, growth))
            need = min(need, self._pool.num_blocks)
            is_empty = self._pool.num_free == self._pool.num_blocks
            spare = 0 if is_empty else self._watermark_blocks
            if need + spare > self._pool.num_free:
                if transfer_id != self._blocked_id:
                    self._blocked_id = transfer_id
                    self.num_blocked += 1
                break
            heapq.heappop(self._waiting)
            incoming.machine.move(ReceiveEvent.ROOM, now)
            incoming.blocks = tuple(self._pool.allocate(transfer_id, need))
            incoming.granted_at = incoming.renewed_at = now
            incoming.begin_epoch(self._new_epoch())
            instructions.append(self._granted(transfer_id, incoming))
            seats -= 1
        return instructions

    def _granted(self, transfer_id: str, incoming: Incoming) -> ToPrefill:
        version = incoming.framing.version
        codecs = self._offered() if version > 1 else ()
        granted = Granted(transfer_id, incoming.epoch, self._config.lease_s, version, codecs)
        return ToPrefill(incoming.peer_key, granted)

    def _offered(self) -> tuple[str, ...]:
        """Labels of what the hand-over may be coded by."""
        ready = (n for n in self._codecs if n == RAW or self._is_ready(n))
        return tuple(sorted(self._labels[name] for name in ready))

    def _peek(self) -> tuple[str, Incoming] | None:
        while self._waiting:
            transfer_id = self._waiting[0][1]
            if self._waits(transfer_id):
                return transfer_id, self._open[transfer_id]
            heapq.heappop(self._waiting)
        return None

    def _waits(self, transfer_id: str) -> bool:
        incoming = self._open.get(transfer_id)
        return incoming is not None and incoming.state is ReceiveState.WAITING

    def _new_epoch(self) -> int:
        epoch = self._next_epoch
        self._next_epoch += 1
        return epoch

    # --- frames -------------------------------------------------------------------------

    def frame(
        self, frame: KvFrame, num_bytes: int, checksum: int, now: float, transport: str = ""
    ) -> list[ReceiveInstruction]:
        """``checksum``: ``frame_checksum`` of what arrived, by that transport. Stale frames
        vanish here. Each WriteKv must be answered by ``written``, however it went."""
        incoming = self._current(frame.transfer_id, frame.epoch)
        if incoming is None:
            return []
        incoming.renewed_at = now
        try:
            incoming.coverage.check(frame, num_bytes, checksum)
            if incoming.end is not None:
                raise WireError(f"KV frame {frame.index} of {frame.transfer_id}: behind the end")
        except WireError as exc:
            return self._corrupt(incoming, str(exc), now)
        incoming.machine.move(ReceiveEvent.FRAME, now)
        if incoming.first_frame_at is None:
            incoming.first_frame_at = now
        incoming.coverage.add(frame)
        incoming.transport = transport
        incoming.num_writing += 1
        return [WriteKv(frame, incoming.blocks, incoming.num_tokens)]

    def written(
        self, frame: KvFrame, seconds: float, problem: str, now: float
    ) -> list[ReceiveInstruction]:
        """A WriteKv has ended; ``problem`` says why what came did not decode, or is ""."""
        transfer_id = frame.transfer_id
        incoming = self._open.get(transfer_id) or self._fencing[transfer_id]
        assert incoming.num_writing > 0
        incoming.machine.move(ReceiveEvent.WRITTEN, now)
        incoming.num_writing -= 1
        if incoming.state is not ReceiveState.RESERVED:
            return self._fenced(incoming, now)
        assert incoming.epoch == frame.epoch, "a write of a dead epoch runs in its heir's blocks"
        if problem:
            reason = f"KV frame {frame.index} of {transfer_id}: {problem}"
            return self._corrupt(incoming, reason, now)
        incoming.num_written += 1
        incoming.written_bytes += frame.num_bytes
        incoming.decode_s += seconds
        if incoming.end is not None and not incoming.num_writing:
            return self._commit(incoming, now)
        if incoming.framing.version < 2:
            return []
        return [ToPrefill(incoming.peer_key, incoming.progress())]

    def end(self, end: TransferEnd, now: float) -> list[ReceiveInstruction]:
        """Commit once all is written, if each row of each layer came exactly once. The blocks
        leave with Arrived.

        An end said again after a commit is acknowledged again, and one of a dead epoch is
        refused again: the first answer may have been lost with a connection.
        """
        incoming = self._current(end.transfer_id, end.epoch)
        if incoming is None:
            return self._answer_again(end)
        problem = incoming.misfit(end)
        if problem:
            return self._corrupt(incoming, problem, now)
        if incoming.end is None:
            incoming.end, incoming.ended_at = end, now
        return [] if incoming.num_writing else self._commit(incoming, now)

    def _commit(self, incoming: Incoming, now: float) -> list[ReceiveInstruction]:
        end, coverage = incoming.end, incoming.coverage
        assert end is not None
        incoming.machine.move(ReceiveEvent.COMPLETE, now)
        del self._open[end.transfer_id]
        self._committed[end.transfer_id] = (end.epoch, incoming.peer_key)
        if len(self._committed) > MAX_REMEMBERED:
            self._committed.popitem(last=False)
        return [
            ToPrefill(incoming.peer_key, TransferAck(end.transfer_id, end.epoch)),
            Arrived(
                end.transfer_id,
                incoming.body,
                end.token_ids,
                incoming.blocks,
                asked_at=incoming.asked_at,
                reserve_wait_s=incoming.granted_at - incoming.asked_at,
                transfer_s=now - (incoming.first_frame_at or now),
                num_bytes=coverage.num_bytes,
                num_frames=coverage.num_frames,
                transport=incoming.transport,
                num_tokens=end.num_tokens,
                complete_from=coverage.complete_from(end.num_tokens),
                num_raw_bytes=coverage.num_raw_bytes,
                codecs=coverage.codecs,
                quality=quality_class(self._qualities[codec] for codec in coverage.codecs),
                exposed_s=end.lag_s + now - incoming.ended_at,
            ),
        ]

    def _answer_again(self, end: TransferEnd) -> list[ReceiveInstruction]:
        epoch, peer_key = self._committed.get(end.transfer_id, (0, ""))
        if epoch and epoch == end.epoch:
            return [ToPrefill(peer_key, TransferAck(end.transfer_id, epoch))]
        incoming = self._open.get(end.transfer_id)
        if incoming is None or end.epoch >= incoming.epoch:
            return []
        reason = "frames of this epoch were refused"
        nack = TransferNack(end.transfer_id, end.epoch, incoming.epoch, reason)
        return [ToPrefill(incoming.peer_key, nack)]

    def _current(self, transfer_id: str, epoch: int) -> Incoming | None:
        incoming = self._open.get(transfer_id)
        if (
            incoming is None
            or incoming.state is not ReceiveState.RESERVED
            or incoming.epoch != epoch
        ):
            self.num_stale += 1
            return None
        return incoming

    def _corrupt(self, incoming: Incoming, reason: str, now: float) -> list[ReceiveInstruction]:
        self.num_corrupt += 1
        incoming.machine.move(ReceiveEvent.CORRUPT, now)
        incoming.reason = reason[:1_000]
        return self._fenced(incoming, now)

    def _fenced(self, incoming: Incoming, now: float) -> list[ReceiveInstruction]:
        """Once no write runs: the next epoch begins, or the blocks are free."""
        if incoming.num_writing:
            return []
        transfer_id = incoming.body_id
        if incoming.machine.move(ReceiveEvent.FENCED, now) is ReceiveState.REVOKED:
            self._fencing.pop(transfer_id, None)
            self._pool.release(transfer_id, incoming.blocks)
            return []
        dead = incoming.epoch
        incoming.begin_epoch(self._new_epoch())
        nack = TransferNack(transfer_id, dead, incoming.epoch, incoming.reason)
        return [ToPrefill(incoming.peer_key, nack)]

    # --- leases -------------------------------------------------------------------------

    def renew(self, peer_key: str, message: LeaseRenew, now: float) -> list[ReceiveInstruction]:
        """Also says again what the prefill side seems not to have heard."""
        instructions: list[ReceiveInstruction] = []
        for transfer_id in message.transfer_ids:
            incoming = self._open.get(transfer_id)
            if incoming is None:
                instructions.append(ToPrefill(peer_key, self._farewell(transfer_id)))
            elif incoming.peer_key == peer_key:
                incoming.renewed_at = now
                if incoming.state is not ReceiveState.RESERVED:
                    continue
                if not incoming.coverage.num_frames:
                    instructions.append(self._granted(transfer_id, incoming))
                elif incoming.framing.version > 1:
                    instructions.append(ToPrefill(peer_key, incoming.progress()))
        return instructions

    def _farewell(self, transfer_id: str) -> Message:
        """How a transfer ended that is open no more, or never was."""
        committed = self._committed.get(transfer_id)
        if committed is not None:
            return TransferAck(transfer_id, committed[0])
        return Denied(transfer_id, "transfer_failed", "the decode side has dropped it", True)

    def bodies(self) -> list[tuple[str, RequestBody]]:
        """(transfer id, request) of all that is open."""
        return [(transfer_id, incoming.body) for transfer_id, incoming in self._open.items()]

    def cancel(self, transfer_id: str, now: float) -> bool:
        """Idempotent. The id is refused from now on, and the blocks are free at once or when the
        last write has ended."""
        return self._drop(transfer_id, ReceiveEvent.ABORT, now) is not None

    def tick(self, now: float) -> list[ReceiveInstruction]:
        """End the transfers whose prefill side was silent for a whole lease."""
        expired = [
            transfer_id
            for transfer_id, incoming in self._open.items()
            if now - incoming.renewed_at > self._config.lease_s
        ]
        instructions: list[ReceiveInstruction] = []
        for transfer_id in expired:
            incoming = self._drop(transfer_id, ReceiveEvent.REVOKE, now)
            assert incoming is not None
            message = f"the prefill side was silent for {self._config.lease_s} s"
            denied = Denied(transfer_id, "transfer_failed", message, True)
            instructions.append(ToPrefill(incoming.peer_key, denied))
        return instructions

    def _drop(self, transfer_id: str, event: ReceiveEvent, now: float) -> Incoming | None:
        incoming = self._open.pop(transfer_id, None)
        if incoming is None:
            return None
        if incoming.machine.move(event, now) is ReceiveState.FENCING:
            self._fencing[transfer_id] = incoming
            self._fenced(incoming, now)
        return incoming
