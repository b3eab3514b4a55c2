"""The decode end of all hand-overs of one worker. Pure.

A reservation waits until its blocks fit, holds them under a lease that the prefill side
renews, and counts frames in under an epoch. A lease that runs out ends the transfer: its id
and epoch are refused from then on, which is the fence that lets the blocks be reused. All
writes are the shell's, on the event loop, after this object allowed that very frame.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass

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
from kv_transfer.frames import Coverage
from kv_transfer.instructions import Arrived, ReceiveInstruction, ToPrefill, WriteKv

MAX_WAITING = 8_192
MAX_REMEMBERED = 4_096


@dataclass(slots=True)
class _Incoming:
    machine: Machine[ReceiveState, ReceiveEvent]
    body: RequestBody
    peer_key: str
    num_tokens: int
    asked_at: float
    renewed_at: float
    coverage: Coverage
    granted_at: float = 0.0
    first_frame_at: float | None = None
    epoch: int = 0
    blocks: tuple[int, ...] = ()
    transport: str = ""


class Receiver:
    def __init__(
        self, pool: Blocks, layout: KvLayout, engine: EngineConfig, config: KvTransferConfig
    ) -> None:
        self._pool = pool
        self._layout = layout
        self._fingerprint = layout.fingerprint()
        self._engine = engine
        self._config = config
        self._open: dict[str, _Incoming] = {}
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
        return len(self._open)

    def __contains__(self, transfer_id: str) -> bool:
        return transfer_id in self._open

    @property
    def num_reserved(self) -> int:
        return sum(1 for t in self._open.values() if t.machine.state is ReceiveState.RESERVED)

    def reserve(self, peer_key: str, ask: Reserve, now: float) -> list[ReceiveInstruction]:
        """Idempotent; an answer comes at once only when it is no. ``grant`` says yes."""
        if ask.transfer_id in self._open or ask.transfer_id in self._committed:
            return []
        body = ask.body
        num_tokens = len(body.prompt_ids) + len(body.output_ids)
        refusal = self._refusal(ask, num_tokens)
        if refusal is not None:
            return [ToPrefill(peer_key, refusal)]
        self._open[ask.transfer_id] = _Incoming(
            machine=Machine(ask.transfer_id, RECEIVE_TRANSITIONS, ReceiveState.WAITING, now),
            body=body,
            peer_key=peer_key,
            num_tokens=num_tokens,
            asked_at=now,
            renewed_at=now,
            coverage=Coverage(self._layout, num_tokens),
        )
        self._num_asked += 1
        heapq.heappush(self._waiting, ((body.priority, self._num_asked), ask.transfer_id))
        return []

    def _refusal(self, ask: Reserve, num_tokens: int) -> Denied | None:
        if ask.fingerprint != self._fingerprint:
            message = f"KV layout {ask.fingerprint} differs from this worker's {self._fingerprint}"
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
            incoming.epoch = self._new_epoch()
            instructions.append(self._granted(transfer_id, incoming))
            seats -= 1
        return instructions

    def _granted(self, transfer_id: str, incoming: _Incoming) -> ToPrefill:
        granted = Granted(transfer_id, incoming.epoch, self._config.lease_s)
        return ToPrefill(incoming.peer_key, granted)

    def _peek(self) -> tuple[str, _Incoming] | None:
        while self._waiting:
            transfer_id = self._waiting[0][1]
            incoming = self._open.get(transfer_id)
            if incoming is not None and incoming.machine.state is ReceiveState.WAITING:
                return transfer_id, incoming
            heapq.heappop(self._waiting)
        return None

    def _new_epoch(self) -> int:
        epoch = self._next_epoch
        self._next_epoch += 1
        return epoch

    def frame(
        self, frame: KvFrame, num_bytes: int, checksum: int, now: float, transport: str = ""
    ) -> list[ReceiveInstruction]:
        """``checksum`` is CRC-32 of the payload that arrived, by that transport. Stale frames
        vanish here."""
        incoming = self._current(frame.transfer_id, frame.epoch)
        if incoming is None:
            return []
        incoming.renewed_at = now
        try:
            incoming.coverage.check(frame, num_bytes, checksum)
        except WireError as exc:
            return self._corrupt(frame.transfer_id, incoming, str(exc), now)
        incoming.machine.move(ReceiveEvent.FRAME, now)
        if incoming.first_frame_at is None:
            incoming.first_frame_at = now
        incoming.coverage.add(frame)
        incoming.transport = transport
        return [WriteKv(frame, incoming.blocks)]

    def end(self, end: TransferEnd, now: float) -> list[ReceiveInstruction]:
        """Commit, if each row of each layer came exactly once. The blocks leave with Arrived.

        An end said again after a commit is acknowledged again, and one of a dead epoch is
        refused again: the first answer may have been lost with a connection.
        """
        incoming = self._current(end.transfer_id, end.epoch)
        if incoming is None:
            return self._answer_again(end)
        coverage = incoming.coverage
        if (
            not coverage.is_complete
            or end.num_frames != coverage.num_frames
            or end.num_tokens != incoming.num_tokens
            or len(end.token_ids) != 1
        ):
            reason = (
                f"{coverage.num_frames} of {end.num_frames} frames, {incoming.num_tokens} of "
                f"{end.num_tokens} tokens, {len(end.token_ids)} drawn at the end"
            )
            return self._corrupt(end.transfer_id, incoming, reason, now)
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

    def _current(self, transfer_id: str, epoch: int) -> _Incoming | None:
        incoming = self._open.get(transfer_id)
        if (
            incoming is None
            or incoming.machine.state is not ReceiveState.RESERVED
            or incoming.epoch != epoch
        ):
            self.num_stale += 1
            return None
        return incoming

    def _corrupt(
        self, transfer_id: str, incoming: _Incoming, reason: str, now: float
    ) -> list[ReceiveInstruction]:
        self.num_corrupt += 1
        incoming.machine.move(ReceiveEvent.CORRUPT, now)
        dead, incoming.epoch = incoming.epoch, self._new_epoch()
        incoming.coverage = Coverage(self._layout, incoming.num_tokens)
        nack = TransferNack(transfer_id, dead, incoming.epoch, reason[:1_000])
        return [ToPrefill(incoming.peer_key, nack)]

    def renew(self, peer_key: str, message: LeaseRenew, now: float) -> list[ReceiveInstruction]:
        """Also says again what the prefill side seems not to have heard."""
        instructions: list[ReceiveInstruction] = []
        for transfer_id in message.transfer_ids:
            incoming = self._open.get(transfer_id)
            if incoming is None:
                instructions.append(ToPrefill(peer_key, self._farewell(transfer_id)))
            elif incoming.peer_key == peer_key:
                incoming.renewed_at = now
                is_reserved = incoming.machine.state is ReceiveState.RESERVED
                if is_reserved and not incoming.coverage.num_frames:
                    instructions.append(self._granted(transfer_id, incoming))
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
        """Idempotent; the blocks are free at once, for the id is refused from now on."""
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

    def _drop(self, transfer_id: str, event: ReceiveEvent, now: float) -> _Incoming | None:
        incoming = self._open.pop(transfer_id, None)
        if incoming is None:
            return None
        incoming.machine.move(event, now)
        self._pool.release(transfer_id, incoming.blocks)
        return incoming
