"""A whole hand-over: sender and receiver joined by a network that loses, repeats and damages.

KV is simulated row by row. Whatever the network did, once it behaves both ends come to rest
with every block free, and what was committed is what was computed.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from baton.engine.block_pool import BlockPool
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
from kv_transfer.frames import RAW, Framing, frame_checksum, framings_of
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
from tests.support.core import DECODE, LAYOUT, ROW_BYTES, body, engine_config, transfer_config

SOURCE_BLOCK, TARGET_BLOCK = 8, 16
NUM_SOURCE_BLOCKS, NUM_TARGET_BLOCKS = 12, 6
LEASE_S = 9.0
FRAME_ROWS = 4
"""``cut_frames`` is given this many rows a frame, far below what a config allows."""

TURNS = (
    "_next_to_decode",
    "_next_to_prefill",
    *("_next_kv", "_next_kv"),
    *("_push_on", "_push_on"),
    *("_write_on", "_write_on"),
)
FAULTS = (
    "_repeat_to_decode",
    "_repeat_to_prefill",
    "_repeat_kv",
    "_damage_kv",
    "_lose_to_decode",
    "_lose_to_prefill",
    "_lose_kv",
)

Row = tuple[str, int, int]


@dataclass
class Prompt:
    """What the prefill worker knows of one transfer while it computes."""

    num_tokens: int
    blocks: list[int]
    num_computed: int = 0


@dataclass
class Source:
    """One life of the prefill worker."""

    peer_key: str
    pool: BlockPool
    sender: Sender
    prompts: dict[str, Prompt] = field(default_factory=dict)
    queue: deque[PushKv | PushEnd] = field(default_factory=deque)
    pushing: tuple[PushKv, deque[tuple[int, Any]]] | None = None


class HandoverMachine(RuleBasedStateMachine):
    @initialize(max_resends=st.integers(0, 3), growth=st.integers(1, 40), seats=st.integers(1, 3))
    def start(self, max_resends: int, growth: int, seats: int) -> None:
        self.now = 100.0
        config = transfer_config(lease_s=LEASE_S, max_resends=max_resends)
        self.config = msgspec.structs.replace(config, max_frame_bytes=FRAME_ROWS * ROW_BYTES)
        self.target = BlockPool(NUM_TARGET_BLOCKS, TARGET_BLOCK)
        engine = engine_config(NUM_TARGET_BLOCKS, growth_tokens=growth, watermark=0.2)
        self.framings: dict[int, Framing] = framings_of(LAYOUT)
        self.receiver = Receiver(self.target, LAYOUT, engine, self.config)
        self.seats = seats
        self.num_lives = 0
        self.num_begun = 0
        self.source = self._be_born()
        self.to_decode: deque[Any] = deque()
        self.to_prefill: deque[Any] = deque()
        self.kv: deque[tuple[Any, bytes]] = deque()
        self.writing: deque[tuple[KvFrame, tuple[int, ...]]] = deque()
        """Writes that run beside the decode worker's loop: one after the other, at any time."""
        self.memory: dict[tuple[int, int, int], Row] = {}
        """(target block, offset, layer) to the row that was written there."""
        self.written: dict[tuple[str, int], Counter[tuple[int, int]]] = {}
        self.committed: dict[str, int] = {}
        self.sent: set[str] = set()

    def _be_born(self) -> Source:
        self.num_lives += 1
        pool = BlockPool(NUM_SOURCE_BLOCKS, SOURCE_BLOCK)
        return Source(f"p|{self.num_lives}", pool, Sender(pool, LAYOUT, self.config))

    # --- the prefill worker -------------------------------------------------------------

    @rule(num_tokens=st.integers(1, 20), max_tokens=st.integers(2, 60))
    def begin(self, num_tokens: int, max_tokens: int) -> None:
        source = self.source
        need = source.pool.blocks_for(num_tokens)
        if need > source.pool.num_free:
            return
        transfer = f"r{self.num_begun}/0"
        request = body(f"r{self.num_begun}", num_tokens, max_tokens=max_tokens)
        self.num_begun += 1
        source.prompts[transfer] = Prompt(num_tokens, source.pool.allocate(transfer, need))
        self._send(source.sender.begin(transfer, DECODE, request, self.now))

    @precondition(lambda self: self.source.prompts)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        transfer = data.draw(st.sampled_from(sorted(self.source.prompts)))
        left = self.source.prompts[transfer].num_tokens - self.source.prompts[transfer].num_computed
        self._compute(transfer, data.draw(st.integers(1, left)))

    def _compute(self, transfer: str, count: int) -> None:
        """As the prefill worker books a chunk: at the last one the blocks change hands."""
        source, prompt = self.source, self.source.prompts[transfer]
        prompt.num_computed += count
        done = prompt.num_computed == prompt.num_tokens
        if done:
            source.pool.hand_over(transfer, owner_name(transfer), prompt.blocks)
            del source.prompts[transfer]
        table = tuple(prompt.blocks[: source.pool.blocks_for(prompt.num_computed)])
        self._send(source.sender.computed(transfer, table, prompt.num_computed, self.now))
        if done:
            self._send(source.sender.prefill_done(transfer, (7,), self.now))

    @precondition(lambda self: self.source.sender.num_open)
    @rule(data=st.data(), luck=st.integers(0, 3))
    def cancel(self, data: st.DataObject, luck: int) -> None:
        if luck:
            return
        transfer = data.draw(st.sampled_from([f"r{i}/0" for i in range(self.num_begun)]))
        self._send(self.source.sender.cancel(transfer, self.now))
        self._forget_prompt(transfer)

    def _forget_prompt(self, transfer: str) -> None:
        prompt = self.source.prompts.pop(transfer, None)
        if prompt is not None:
            self.source.pool.release(transfer, prompt.blocks)

    def _send(self, instructions: list[Any]) -> None:
        source = self.source
        for instruction in instructions:
            match instruction:
                case ToDecode(decode, message):
                    assert decode == DECODE
                    self.to_decode.append((source.peer_key, message))
                case PushKv() | PushEnd():
                    source.queue.append(instruction)
                case CancelPush(transfer):
                    source.queue = deque(j for j in source.queue if transfer_of(j) != transfer)
                    if source.pushing is not None and source.pushing[0].transfer_id == transfer:
                        source.pushing = None
                case SendClosed(transfer, error_code):
                    self._forget_prompt(transfer)
                    if not error_code:
                        assert transfer in self.committed, "acknowledged, never committed"
                        assert transfer not in self.sent
                        self.sent.add(transfer)
                case _:
                    raise AssertionError(instruction)

    def push(self) -> None:
        """One frame: the blocks are read now."""
        source = self.source
        if source.pushing is None:
            job = source.queue.popleft()
            if isinstance(job, PushEnd):
                self.kv.append((job.end, b""))
                return
            framing = self.framings[job.version]
            cuts = framing.cuts(
                job.token_start,
                job.num_tokens,
                self.config.max_frame_bytes,
                num_tokens_total=job.num_tokens_total,
                layers=job.layers,
            )
            source.pushing = (job, deque(enumerate(cuts, job.first_index)))
        job, left = source.pushing
        index, cut = left.popleft()
        if not left:
            source.pushing = None
        for block in job.block_table:
            held = source.pool.holders(block) & {job.transfer_id, owner_name(job.transfer_id)}
            assert held, "read after release"
        size = cut.num_layers * cut.num_tokens * ROW_BYTES
        payload = f"{job.transfer_id}:{index}".encode().ljust(size, b".")
        frame = KvFrame(
            job.transfer_id,
            job.epoch,
            self.framings[job.version].fingerprint,
            index,
            cut.layer_start,
            cut.num_layers,
            cut.token_start,
            cut.num_tokens,
            RAW,
            size,
            0,
            job.version,
            cut.group,
        )
        frame = msgspec.structs.replace(frame, checksum=frame_checksum(frame, payload))
        self.kv.append((frame, payload))

    @rule(luck=st.integers(0, 9))
    def prefill_dies(self, luck: int) -> None:
        """Its queues die with it, and another life begins under another key."""
        if self.num_lives < 3 and luck == 0:
            self.source = self._be_born()
            self.to_prefill.clear()

    # --- the decode worker --------------------------------------------------------------

    def _receive(self, instructions: list[Any]) -> None:
        granted = self.receiver.grant(self.seats, self.now)
        for instruction in [*instructions, *granted]:
            match instruction:
                case ToPrefill(peer_key, message):
                    if peer_key == self.source.peer_key:
                        self.to_prefill.append(message)
                case WriteKv(frame, table):
                    self.writing.append((frame, table))
                case Arrived():
                    self._commit(instruction)
                case _:
                    raise AssertionError(instruction)

    def _write_on(self) -> None:
        """The oldest write that was let in is done."""
        if self.writing:
            frame, table = self.writing.popleft()
            self._write(frame, table)
            self._receive(self.receiver.written(frame, 0.001, "", self.now))

    def _write(self, frame: KvFrame, table: tuple[int, ...]) -> None:
        transfer = frame.transfer_id
        counts = self.written.setdefault((transfer, frame.epoch), Counter())
        for token in range(frame.token_start, frame.token_start + frame.num_tokens):
            block = table[token // TARGET_BLOCK]
            assert self.target.holders(block) == {transfer}, "written to another's block"
            for layer in range(frame.layer_start, frame.layer_start + frame.num_layers):
                self.memory[block, token % TARGET_BLOCK, layer] = (transfer, layer, token)
                counts[layer, token] += 1

    def _commit(self, arrived: Arrived) -> None:
        transfer = arrived.transfer_id
        assert transfer not in self.committed, "committed twice"
        assert arrived.token_ids == (7,)
        num_tokens = len(arrived.body.prompt_ids)
        rows = {(layer, token) for layer in range(3) for token in range(num_tokens)}
        epoch = max(e for t, e in self.written if t == transfer)
        assert self.written[transfer, epoch] == Counter(rows)
        for layer, token in rows:
            block = arrived.blocks[token // TARGET_BLOCK]
            assert self.memory[block, token % TARGET_BLOCK, layer] == (transfer, layer, token)
        self.committed[transfer] = num_tokens
        self.target.hand_over(transfer, "running", arrived.blocks)

    @precondition(lambda self: "running" in self.target.owners)
    @rule()
    def finish_decoding(self) -> None:
        blocks = [b for b in range(NUM_TARGET_BLOCKS) if "running" in self.target.holders(b)]
        self.target.release("running", blocks)
        self._receive([])

    @precondition(lambda self: self.target.num_free)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        """Other sequences take blocks."""
        self.target.allocate("running", data.draw(st.integers(1, min(2, self.target.num_free))))

    # --- the network --------------------------------------------------------------------

    def _deliver_to_decode(self, peer_key: str, message: Any) -> None:
        receiver, now = self.receiver, self.now
        match message:
            case Reserve():
                self._receive(receiver.reserve(peer_key, message, now))
            case LeaseRenew():
                self._receive(receiver.renew(peer_key, message, now))
            case TransferCancel(transfer):
                receiver.cancel(transfer, now)
                self._receive([])
            case _:
                raise AssertionError(message)

    def _deliver_to_prefill(self, message: Any) -> None:
        sender, now = self.source.sender, self.now
        match message:
            case Granted():
                self._send(sender.granted(message, DECODE, now))
            case Denied():
                self._send(sender.denied(message, now))
            case TransferAck():
                self._send(sender.acked(message, now))
            case TransferNack():
                self._send(sender.nacked(message, now))
            case KvProgress():
                pass  # for the window of the shell
            case _:
                raise AssertionError(message)

    def _deliver_kv(self, message: Any, payload: bytes) -> None:
        if isinstance(message, TransferEnd):
            self._receive(self.receiver.end(message, self.now))
        else:
            checksum = frame_checksum(message, payload)
            self._receive(self.receiver.frame(message, len(payload), checksum, self.now))

    @rule(
        count=st.integers(1, 12),
        script=st.lists(st.sampled_from(TURNS * 3 + FAULTS), min_size=8, max_size=100),
    )
    def progress(self, count: int, script: list[str]) -> None:
        """The prefill side computes on, then ``script`` happens: mostly good, some faults."""
        for transfer, prompt in list(self.source.prompts.items()):
            self._compute(transfer, min(count, prompt.num_tokens - prompt.num_computed))
        for turn in script:
            getattr(self, turn)()

    def _next_to_decode(self) -> None:
        if self.to_decode:
            self._deliver_to_decode(*self.to_decode.popleft())

    def _next_to_prefill(self) -> None:
        if self.to_prefill:
            self._deliver_to_prefill(self.to_prefill.popleft())

    def _next_kv(self) -> None:
        if self.kv:
            self._deliver_kv(*self.kv.popleft())

    def _push_on(self) -> None:
        if self.source.queue or self.source.pushing:
            self.push()

    @property
    def _is_busy(self) -> bool:
        source = self.source
        on_its_way = self.to_decode or self.to_prefill or self.kv or self.writing
        return bool(on_its_way or source.queue or source.pushing)

    def _repeat_to_decode(self) -> None:
        if self.to_decode:
            self._deliver_to_decode(*self.to_decode[0])

    def _repeat_to_prefill(self) -> None:
        if self.to_prefill:
            self._deliver_to_prefill(self.to_prefill[0])

    def _repeat_kv(self) -> None:
        if self.kv:
            self._deliver_kv(*self.kv[0])

    def _damage_kv(self) -> None:
        if not self.kv:
            return
        message, payload = self.kv.popleft()
        if isinstance(message, TransferEnd):
            message = msgspec.structs.replace(message, num_frames=message.num_frames + 1)
        self._deliver_kv(message, payload[:-1] + b"!" if payload else b"")

    def _lose_to_decode(self) -> None:
        """A connection is cut: what was on its way is gone, what comes later arrives."""
        if self.to_decode:
            self.to_decode.popleft()

    def _lose_to_prefill(self) -> None:
        if self.to_prefill:
            self.to_prefill.popleft()

    def _lose_kv(self) -> None:
        if self.kv:
            self.kv.popleft()

    @rule(seconds=st.sampled_from([0.1, 1.0, 1.0, LEASE_S / 3, LEASE_S / 3, LEASE_S + 0.1]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self._tick()

    def _tick(self) -> None:
        self._send(self.source.sender.tick(self.now))
        self._receive(self.receiver.tick(self.now))

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "source"):
            return
        assert self.source.pool.check_integrity() == []
        assert self.target.check_integrity() == []
        open_here = {transfer for transfer, _ in self.receiver.bodies()}
        written_here = {frame.transfer_id for frame, _ in self.writing}
        assert self.target.owners <= open_here | written_here | {"running"}

    def teardown(self) -> None:
        """From here on the network behaves: both ends must come to rest by themselves."""
        if not hasattr(self, "source"):
            return
        for transfer, prompt in list(self.source.prompts.items()):
            self._compute(transfer, prompt.num_tokens - prompt.num_computed)
        for _ in range(200):
            while self._is_busy:
                for turn in TURNS:
                    getattr(self, turn)()
            if "running" in self.target.owners:
                self.finish_decoding()
            if not self.source.sender.num_open and not self.receiver.num_open:
                break
            self.now += LEASE_S / 3
            self._tick()
        assert (self.source.sender.num_open, self.receiver.num_open) == (0, 0), "stuck"
        assert self.receiver.num_reserved == 0
        assert self.source.pool.num_free == NUM_SOURCE_BLOCKS
        assert self.target.num_free == NUM_TARGET_BLOCKS


def transfer_of(job: PushKv | PushEnd) -> str:
    return job.transfer_id if isinstance(job, PushKv) else job.end.transfer_id


TestHandover = HandoverMachine.TestCase
TestHandover.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


def test_without_faults_every_row_arrives_and_nothing_is_sent_twice() -> None:
    machine = HandoverMachine()
    machine.start(max_resends=0, growth=8, seats=3)
    machine.begin(num_tokens=17, max_tokens=10)
    machine._compute("r0/0", 9)
    machine.begin(num_tokens=5, max_tokens=10)
    machine.teardown()
    assert machine.committed == {"r0/0": 17, "r1/0": 5}
    assert machine.sent == {"r0/0", "r1/0"}
    assert machine.receiver.num_corrupt == machine.receiver.num_stale == 0
    assert all(count == 1 for rows in machine.written.values() for count in rows.values())


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_a_long_run_with_few_faults_comes_to_rest(seed: int) -> None:
    long_run(seed)


def long_run(seed: int) -> None:
    """Deeper than the rules above get: hundreds of turns, a fault in twenty."""
    rng = random.Random(seed)
    machine = HandoverMachine()
    machine.start(rng.randint(0, 3), rng.randint(1, 40), rng.randint(1, 3))
    for _ in range(400):
        kind = rng.random()
        if kind < 0.85:
            getattr(machine, rng.choice(TURNS))()
        elif kind < 0.90:
            getattr(machine, rng.choice(FAULTS))()
        elif kind < 0.93:
            machine.begin(rng.randint(1, 30), rng.randint(2, 60))
        elif kind < 0.97 and machine.source.prompts:
            transfer = rng.choice(sorted(machine.source.prompts))
            prompt = machine.source.prompts[transfer]
            machine._compute(transfer, rng.randint(1, prompt.num_tokens - prompt.num_computed))
        elif kind < 0.98 and "running" in machine.target.owners:
            machine.finish_decoding()
        elif kind < 0.997:
            machine.wait(rng.choice([0.1, 1.0, LEASE_S / 3]))
        elif kind < 0.999:
            machine.wait(LEASE_S + 0.1)
        else:
            machine.prefill_dies(0)
        machine.adds_up()
    machine.teardown()
