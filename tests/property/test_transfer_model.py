"""Every order of events of one hand-over, walked: both ends' machines, and a network with faults.

A state is both objects, what is on its way, and how many faults are left. Each of the three
channels keeps its order, as its connection does, and between channels any order may come. A fault
loses, repeats, damages or overtakes what is next on a channel, or freezes the prefill side for a
whole lease. Cancelling, at either end and at any moment, is no fault.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from baton.protocol.layout import KvLayout
from baton.protocol.messages import (
    Denied,
    Granted,
    KvFrame,
    KvProgress,
    LeaseRenew,
    Reserve,
    TransferAck,
    TransferCancel,
    TransferEnd,
    TransferNack,
)
from kv_transfer.frames import RAW, FrameCut, end_checksum, frame_checksum, framings_of
from kv_transfer.incoming import Incoming
from kv_transfer.instructions import (
    Arrived,
    CancelPush,
    PushEnd,
    PushKv,
    SendClosed,
    ToDecode,
    ToPrefill,
    WriteKv,
)
from kv_transfer.receiver import Receiver
from kv_transfer.sender import Sender, owner_name
from kv_transfer.sent_rows import SentRows
from tests.support.core import DECODE, body, engine_config, transfer_config

T = "r/0"
P = "p-0|1"
LEASE_S = 9.0
LAYOUT = KvLayout.uniform(
    num_layers=2, num_kv_heads=1, head_dim=1, dtype="float32", model_digest="m"
)
FRAMINGS = framings_of(LAYOUT)
CONFIG = transfer_config(lease_s=LEASE_S, max_resends=1)
BODY = body("r", 1, max_tokens=2)
CHANNELS = ("to_decode", "to_prefill", "kv")
DAMAGED = b"damaged!"


@dataclass
class Pool:
    """As ``Blocks``, so small that a copy costs nothing."""

    num_blocks: int = 1
    owner: str = ""

    @property
    def num_free(self) -> int:
        return int(not self.owner)

    def blocks_for(self, num_tokens: int) -> int:
        return 1

    def allocate(self, owner: str, count: int) -> list[int]:
        assert not self.owner
        self.owner = owner
        return [0]

    def release(self, owner: str, blocks: Any) -> None:
        if blocks:
            assert self.owner == owner, f"{owner} gives back what is {self.owner}'s"
            self.owner = ""


@dataclass
class World:
    num_faults: int
    may_stop_short: bool
    source: Pool = field(default_factory=Pool)
    target: Pool = field(default_factory=Pool)
    sender: Sender = field(init=False)
    receiver: Receiver = field(init=False)
    to_decode: deque[Any] = field(default_factory=deque)
    to_prefill: deque[Any] = field(default_factory=deque)
    kv: deque[tuple[Any, bytes]] = field(default_factory=deque)
    jobs: deque[PushKv | PushEnd] = field(default_factory=deque)
    rows: SentRows | None = None
    writing: deque[tuple[KvFrame, bytes]] = field(default_factory=deque)
    memory: dict[int, bytes] = field(default_factory=dict)
    """By layer: what was written for the one token."""
    num_layers: int = 0
    """That are computed."""
    may_cancel: bool = True
    is_committed: bool = False
    is_sent: bool = False
    sender_now: float = 0.0
    receiver_now: float = 0.0

    def __post_init__(self) -> None:
        self.sender = Sender(self.source, LAYOUT, CONFIG)
        self.receiver = Receiver(self.target, LAYOUT, engine_config(1), CONFIG)
        self.source.allocate(T, 1)
        self._send(self.sender.begin(T, DECODE, BODY, 0.0))

    def clone(self) -> World:
        """What changes is copied, one thing at a time: ``deepcopy`` takes ten times as long."""
        world = copy.copy(self)
        world.source, world.target = copy.copy(self.source), copy.copy(self.target)
        world.sender = _copied_sender(self.sender, world.source)
        world.receiver = _copied_receiver(self.receiver, world.target)
        for name in ("to_decode", "to_prefill", "kv", "jobs", "writing", "memory"):
            setattr(world, name, getattr(self, name).copy())
        if self.rows is not None:
            world.rows = copy.copy(self.rows)
            world.rows._sent = list(self.rows._sent)
        return world

    def _incoming(self) -> list[Any]:
        return [*self.receiver._open.values(), *self.receiver._fencing.values()]

    def key(self) -> tuple[Any, ...]:
        """All that decides what can happen; no times, no counts of what has been."""
        out = self.sender._open.get(T)
        sender = out and (
            out.machine.state, out.epoch, tuple(out.computed), tuple(out.sent), out.num_frames,
            out.num_resends, out.token_ids,
        )  # fmt: skip
        incoming = tuple(
            (i.state, i.epoch, i.num_writing, tuple(i.coverage._arrived), i.coverage.num_frames,
             i.end is not None)
            for i in self._incoming()
        )  # fmt: skip
        rows = self.rows and (self.rows.epoch, self.rows.num_frames, self.rows.is_stopped)
        return (
            self.num_faults, sender, incoming, tuple(self.receiver._committed.items()),
            self.receiver._next_epoch, len(self.receiver._waiting), tuple(self.to_decode),
            tuple(self.to_prefill), tuple(self.kv), tuple(self.jobs), rows, tuple(self.writing),
            tuple(sorted(self.memory.items())), self.num_layers, self.source.owner,
            self.target.owner, self.may_cancel, self.is_committed, self.is_sent,
        )  # fmt: skip

    # --- what can happen ----------------------------------------------------------------

    def events(self) -> Iterator[tuple[str, Callable[[World], None]]]:
        """Without faults; each is done to a clone."""
        if self.to_decode:
            yield "deliver to decode", lambda w: w._heard_at_decode(w.to_decode.popleft())
        if self.to_prefill:
            yield "deliver to prefill", lambda w: w._heard_at_prefill(w.to_prefill.popleft())
        if self.kv:
            yield "deliver KV", lambda w: w._kv_came(*w.kv.popleft())
        if self.jobs:
            yield "push", World._push
            if self.may_stop_short and self.rows is not None and not self.rows.is_stopped:
                yield "leave the rest", lambda w: w.rows.stop()  # type: ignore[union-attr]
        if self.writing:
            yield "write", World._write
        if self.num_layers < 2 and T in self.sender:
            yield "compute a layer", World._compute
        is_open = T in self.sender
        if is_open and not any((self.to_decode, self.to_prefill, self.kv, self.jobs)):
            yield "tick", World._tick
        if self.receiver.num_open and not is_open:
            yield "lease of what nobody renews", World._expire
        if self.may_cancel:
            yield "cancel at prefill", World._cancel_at_prefill
            yield "cancel at decode", World._cancel_at_decode

    def faults(self) -> Iterator[tuple[str, Callable[[World], None]]]:
        if not self.num_faults:
            return
        for channel in CHANNELS:
            if getattr(self, channel):
                yield f"lose {channel}", lambda w, c=channel: getattr(w, c).popleft()
                yield f"repeat {channel}", lambda w, c=channel: w._repeat(getattr(w, c))
        if self.kv:
            yield "damage KV", World._damage
        if len(self.kv) > 1:
            yield "overtake on KV", World._overtake
        if self.receiver.num_open and T in self.sender:
            yield "freeze prefill", World._expire

    @staticmethod
    def _repeat(channel: deque[Any]) -> None:
        channel.insert(1, channel[0])

    def _damage(self) -> None:
        message, payload = self.kv[0]
        if isinstance(message, TransferEnd):
            message = msgspec.structs.replace(message, token_ids=(8,))
        self.kv[0] = (message, DAMAGED if payload else b"")

    def _overtake(self) -> None:
        self.kv[0], self.kv[1] = self.kv[1], self.kv[0]

    def _tick(self) -> None:
        self.sender_now += LEASE_S + 1
        self._send(self.sender.tick(self.sender_now))
        self._receive([])

    def _expire(self) -> None:
        self.receiver_now += LEASE_S + 1
        self._receive(self.receiver.tick(self.receiver_now))

    def _cancel_at_prefill(self) -> None:
        self.may_cancel = False
        if self.source.owner == T:
            self.source.release(T, [0])
        self._send(self.sender.cancel(T, self.sender_now))
        self.num_layers = 2

    def _cancel_at_decode(self) -> None:
        self.may_cancel = False
        self.receiver.cancel(T, self.receiver_now)
        self._receive([])

    # --- the prefill side ---------------------------------------------------------------

    def _compute(self) -> None:
        self.num_layers += 1
        if self.num_layers == 2:
            self.source.owner = owner_name(T)
        now = self.sender_now
        self._send(self.sender.layers_computed(T, (0,), 1, self.num_layers, now))
        if self.num_layers == 2:
            self._send(self.sender.prefill_done(T, (7,), now))

    def _send(self, instructions: list[Any]) -> None:
        for instruction in instructions:
            match instruction:
                case ToDecode(_, message):
                    self.to_decode.append(message)
                case PushKv() | PushEnd():
                    self.jobs.append(instruction)
                case CancelPush():
                    self.jobs.clear()
                    self.rows = None
                case SendClosed(_, error_code):
                    if self.source.owner == T:
                        self.source.release(T, [0])
                        self.num_layers = 2
                    self.is_sent = not error_code
                    assert error_code or self.is_committed, "acknowledged, never committed"

    def _push(self) -> None:
        """One frame, or an end, as the pusher does."""
        job = self.jobs.popleft()
        if isinstance(job, PushEnd):
            end = job.end if self.rows is None else self.rows.cut_short(job.end)
            end = msgspec.structs.replace(end, checksum=end_checksum(end))
            self.kv.append((end, b""))
            return
        framing = FRAMINGS[job.version]
        if self.rows is None or self.rows.epoch != job.epoch:
            self.rows = SentRows(framing, job.epoch, 1)
        if self.rows.is_stopped:
            return
        assert self.source.owner in (T, owner_name(T)), "read after release"
        cut = FrameCut(job.layers.start, len(job.layers), 0, 1)
        self.rows.add(cut)
        payload = b"".join(bytes([n] * framing.row_bytes(0)) for n in job.layers)
        place = (cut.layer_start, cut.num_layers, 0, 1)
        size = len(payload)
        frame = KvFrame(
            T, job.epoch, framing.fingerprint, job.first_index, *place, RAW, size, 0, job.version
        )
        frame = msgspec.structs.replace(frame, checksum=frame_checksum(frame, payload))
        self.kv.append((frame, payload))

    def _heard_at_prefill(self, message: Any) -> None:
        sender, now = self.sender, self.sender_now
        match message:
            case Granted():
                self._send(sender.granted(message, DECODE, now))
            case Denied():
                self._send(sender.denied(message, now))
            case TransferAck():
                self._send(sender.acked(message, now))
            case TransferNack():
                self._send(sender.nacked(message, now))

    # --- the decode side ----------------------------------------------------------------

    def _heard_at_decode(self, message: Any) -> None:
        receiver, now = self.receiver, self.receiver_now
        match message:
            case Reserve():
                self._receive(receiver.reserve(P, message, now))
            case LeaseRenew():
                self._receive(receiver.renew(P, message, now))
            case TransferCancel():
                receiver.cancel(T, now)
                self._receive([])

    def _kv_came(self, message: Any, payload: bytes) -> None:
        now = self.receiver_now
        if isinstance(message, TransferEnd):
            self._receive(self.receiver.end(message, now))
            return
        checksum = frame_checksum(message, payload)
        said = self.receiver.frame(message, len(payload), checksum, now)
        for instruction in said:
            if isinstance(instruction, WriteKv):
                self.writing.append((message, payload))
        self._receive([i for i in said if not isinstance(i, WriteKv)])

    def _write(self) -> None:
        frame, payload = self.writing.popleft()
        size = FRAMINGS[frame.version].row_bytes(0)
        for number in range(frame.num_layers):
            self.memory[frame.layer_start + number] = payload[number * size : (number + 1) * size]
        self._receive(self.receiver.written(frame, 0.0, "", self.receiver_now))

    def _receive(self, instructions: list[Any]) -> None:
        for instruction in [*instructions, *self.receiver.grant(1, self.receiver_now)]:
            match instruction:
                case ToPrefill(_, message):
                    if not isinstance(message, KvProgress):
                        self.to_prefill.append(message)
                case Arrived():
                    self._commit(instruction)

    def _commit(self, arrived: Arrived) -> None:
        assert not self.is_committed, "committed twice"
        assert arrived.token_ids == (7,)
        if arrived.num_tokens:
            size = FRAMINGS[2].row_bytes(0)
            assert self.memory == {0: bytes(size), 1: bytes([1] * size)}
        self.is_committed = True
        self.memory.clear()
        self.target.release(T, arrived.blocks)
        self._receive([])

    # --- what must hold -----------------------------------------------------------------

    def check(self) -> None:
        assert not self.writing or self.target.owner == T, "freed while a write of it may run"
        assert not self.writing or self.receiver.num_open, "nobody waits for a write"
        if self.target.owner:
            assert self.receiver.num_open, "a block that no hand-over holds"
        epochs = {frame.epoch for frame, _ in self.writing}
        assert len(epochs) <= 1, "writes of two epochs run into the same blocks"

    @property
    def is_at_rest(self) -> bool:
        on_its_way = (self.to_decode, self.to_prefill, self.kv, self.jobs, self.writing)
        return (
            not any(on_its_way)
            and not self.sender.num_open
            and not self.receiver.num_open
            and not self.source.owner
            and not self.target.owner
        )


def _copied_sender(sender: Sender, pool: Pool) -> Sender:
    made = copy.copy(sender)
    made._pool, made._rates = pool, {}
    made._open = {}
    for transfer, out in sender._open.items():
        made._open[transfer] = other = copy.copy(out)
        other.machine = copy.copy(out.machine)
        other.computed, other.sent = list(out.computed), list(out.sent)
    return made


def _copied_receiver(receiver: Receiver, pool: Pool) -> Receiver:
    made = copy.copy(receiver)
    made._pool = pool
    made._waiting, made._committed = list(receiver._waiting), receiver._committed.copy()
    for name in ("_open", "_fencing"):
        copies = {t: _copied_incoming(i) for t, i in getattr(receiver, name).items()}
        setattr(made, name, copies)
    return made


def _copied_incoming(incoming: Incoming) -> Incoming:
    made = copy.copy(incoming)
    made.machine = copy.copy(incoming.machine)
    made.coverage = copy.copy(incoming.coverage)
    made.coverage._arrived = list(incoming.coverage._arrived)
    made.coverage.codecs = dict(incoming.coverage.codecs)
    return made


def walk(world: World) -> tuple[int, int]:
    """(states, states at rest). Raises AssertionError with the way to what is wrong."""
    numbers: dict[Any, int] = {world.key(): 0}
    story: list[tuple[int, str]] = [(-1, "begin")]
    backward: list[list[int]] = [[]]
    """By state: those that lead here without a fault."""
    at_rest: list[int] = []
    frontier = deque([(0, world)])
    while frontier:
        number, here = frontier.popleft()
        if here.is_at_rest:
            at_rest.append(number)
        for is_fault, choices in ((False, here.events()), (True, here.faults())):
            for name, event in choices:
                there = here.clone()
                there.num_faults -= is_fault
                try:
                    event(there)
                    there.check()
                except AssertionError as exc:
                    raise AssertionError(f"{exc}: {_way(story, number)}, {name}") from exc
                key = there.key()
                found = numbers.setdefault(key, len(numbers))
                if found == len(story):
                    story.append((number, name))
                    backward.append([])
                    frontier.append((found, there))
                if not is_fault:
                    backward[found].append(number)
    saved, todo = set(at_rest), list(at_rest)
    while todo:
        fresh = [n for n in backward[todo.pop()] if n not in saved]
        saved.update(fresh)
        todo += fresh
    stuck = next((n for n in range(len(story)) if n not in saved), None)
    assert stuck is None, f"no way to rest: {_way(story, stuck)}"
    return len(story), len(at_rest)


def _way(story: list[tuple[int, str]], number: int | None) -> str:
    names: list[str] = []
    while number is not None and number >= 0:
        number, name = story[number]
        names.append(name)
    return ", ".join(reversed(names))


def test_every_order_of_events_with_a_fault_comes_to_rest() -> None:
    """Ends may come short. ``tests/integration/test_two_faults.py`` walks two faults."""
    num_states, num_at_rest = walk(World(num_faults=1, may_stop_short=True))
    print(f"\n{num_states} states, {num_at_rest} at rest")
    assert num_states > 1_000
    assert num_at_rest > 1
