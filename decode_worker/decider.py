"""What a decode (or mixed) worker does when something happens. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from baton.engine.block_pool import BlockPool
from baton.engine.plan import FailedSequence
from baton.engine.scheduler import NewToken, Scheduler, Sequence
from baton.protocol.config import EngineConfig
from baton.protocol.ids import RequestId, transfer_id
from baton.protocol.messages import (
    Abort,
    AnyMessage,
    Denied,
    Dispatch,
    HopTimes,
    KvFrame,
    LeaseRenew,
    LoadReport,
    RequestBody,
    Reserve,
    TokenItem,
    TransferCancel,
    TransferEnd,
)
from baton.worker.admission import refusal
from baton.worker.desk import RouterDesk
from baton.worker.events import (
    CompileGrammar,
    FromPeer,
    GrammarFailed,
    GrammarReady,
    RunStep,
    ShellFacts,
    StepDone,
    StepRaised,
    StepWanted,
    Tick,
)
from baton.worker.grammar_gate import GrammarGate
from kv_transfer.frames import RAW
from kv_transfer.instructions import Arrived, ReceiveInstruction, ToPrefill
from kv_transfer.receiver import Receiver

MAX_JOBS = 16_384


@dataclass(frozen=True, slots=True)
class FrameArrived:
    """``checksum`` is CRC-32 of the payload. The payload itself stays with the shell."""

    frame: KvFrame
    num_bytes: int
    checksum: int


@dataclass(frozen=True, slots=True)
class EndArrived:
    end: TransferEnd


@dataclass(slots=True)
class _Job:
    """A request that this worker decodes. ``arrived`` tells of its hand-over, once."""

    body: RequestBody
    arrived_at: float
    deadline_at: float
    started_at: float | None = None
    arrived: HopTimes | None = None


class DecodeDecider:
    def __init__(
        self,
        worker_id: str,
        incarnation: str,
        role: str,
        config: EngineConfig,
        pool: BlockPool,
        scheduler: Scheduler,
        receiver: Receiver,
        vocab_size: int,
    ) -> None:
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._role = role
        self._config = config
        self._pool = pool
        self._scheduler = scheduler
        self._receiver = receiver
        self._vocab_size = vocab_size
        self._desk = RouterDesk(worker_id, incarnation, role, self._holds)
        self._gate = GrammarGate()
        self._jobs: dict[str, _Job] = {}

    @property
    def has_step_in_flight(self) -> bool:
        return self._scheduler.has_step_in_flight

    @property
    def num_open(self) -> int:
        return len(self._jobs) + self._receiver.num_open + self._desk.num_streams

    def handle(self, event: object, now: float) -> list[object]:
        return [*self._react(event, now), *self._grant(now)]

    def _react(self, event: object, now: float) -> list[object]:
        match event:
            case FromPeer(peer_key, sender_id, _, message):
                return self._from_peer(peer_key, sender_id, message, now)
            case FrameArrived(frame, num_bytes, checksum):
                return [*self._receiver.frame(frame, num_bytes, checksum, now)]
            case EndArrived(end):
                return self._received(self._receiver.end(end, now), now)
            case StepWanted():
                return self._step(now)
            case StepDone(result):
                failed = [i for f in result.failed for i in self._cannot_go_on(f)]
                return [*failed, *self._book(self._scheduler.complete(result), now)]
            case StepRaised(reason):
                return self._step_raised(reason)
            case GrammarReady(constraint):
                for sequence in self._gate.open(constraint):
                    self._run(sequence)
                return []
            case GrammarFailed():
                return self._grammar_failed(event)
            case Tick():
                return self._tick(now)
        raise AssertionError(f"unknown event {event!r}")

    # --- messages -----------------------------------------------------------------------

    def _from_peer(
        self, peer_key: str, sender_id: str, message: AnyMessage, now: float
    ) -> list[object]:
        match message:
            case Dispatch(body, _):
                self._desk.seen(body.router_id, now)
                return self._accept(body, now)
            case Abort(request_id, attempt):
                self._abort(request_id, attempt, now)
            case Reserve():
                return self._reserve(peer_key, message, now)
            case LeaseRenew():
                return [*self._receiver.renew(peer_key, message, now)]
            case TransferCancel(transfer):
                self._receiver.cancel(transfer, now)
            case _:
                return self._desk.handle(sender_id, message, now)
        return []

    def _accept(self, body: RequestBody, now: float) -> list[object]:
        """Both phases here."""
        seq_id = transfer_id(RequestId(body.request_id), body.attempt)
        if seq_id in self._jobs or self._scheduler.get(seq_id) is not None:
            return []
        code, reason, retryable = self._refusal(body)
        if code:
            return [self._desk.failed(body, code, reason, retryable=retryable)]
        self._jobs[seq_id] = _Job(body, now, now + body.deadline_in_s)
        sequence = Sequence(
            seq_id,
            body.prompt_ids,
            list(body.output_ids),
            body.sampling,
            body.priority,
            tenant=body.tenant,
        )
        if body.sampling.constraint is not None:
            return [*self._gate.hold(sequence)]
        self._scheduler.add(sequence)
        return []

    def _reserve(self, peer_key: str, ask: Reserve, now: float) -> list[object]:
        self._desk.seen(ask.body.router_id, now)
        transfer = ask.transfer_id
        if self._scheduler.get(transfer) is not None or transfer in self._gate:
            return []
        code, reason, retryable = self._refusal(ask.body)
        if not code and transfer != transfer_id(RequestId(ask.body.request_id), ask.body.attempt):
            code, reason = "invalid_request", "the transfer id does not belong to the request"
        if code:
            return [ToPrefill(peer_key, Denied(transfer, code, reason, retryable))]
        constraint = ask.body.sampling.constraint
        early = [] if constraint is None else [CompileGrammar(constraint)]
        return [*early, *self._receiver.reserve(peer_key, ask, now)]

    def _refusal(self, body: RequestBody) -> tuple[str, str, bool]:
        """(code, message, retryable); the code is "" for a request that can run here."""
        if len(self._jobs) >= MAX_JOBS:
            return "overloaded", f"{MAX_JOBS} requests are open here", True
        # The last token drawn is never computed.
        kv_tokens = len(body.prompt_ids) + max(len(body.output_ids), body.sampling.max_tokens - 1)
        reason = refusal(body, kv_tokens, self._pool, self._vocab_size)
        return ("invalid_request", reason, False) if reason else ("", "", False)

    def _abort(self, request_id: str, attempt: int, now: float) -> None:
        self._desk.forget(request_id, attempt)
        for seq_id, job in list(self._jobs.items()):
            if job.body.request_id == request_id and job.body.attempt <= attempt:
                self._drop(seq_id)
        for transfer, body in self._receiver.bodies():
            if body.request_id == request_id and body.attempt <= attempt:
                self._receiver.cancel(transfer, now)

    def _drop(self, seq_id: str) -> None:
        del self._jobs[seq_id]
        held = self._gate.drop(seq_id)
        if held is None:
            self._scheduler.drop(seq_id)
        else:
            self._pool.release(seq_id, held.block_table)

    def _run(self, sequence: Sequence) -> None:
        if sequence.block_table:
            self._scheduler.add_computed(sequence)
        else:
            self._scheduler.add(sequence)

    def _grammar_failed(self, failed: GrammarFailed) -> list[object]:
        instructions: list[object] = []
        for sequence in self._gate.open(failed.constraint):
            self._pool.release(sequence.seq_id, sequence.block_table)
            body = self._jobs.pop(sequence.seq_id).body
            instructions.append(
                self._desk.failed(body, failed.code, failed.message, retryable=failed.retryable)
            )
        return instructions

    # --- transfers ----------------------------------------------------------------------

    def _grant(self, now: float) -> list[object]:
        """Preempted sequences come back before anything new is let in."""
        if self._scheduler.num_waiting:
            return []
        taken = self._scheduler.num_running + self._gate.num_with_blocks
        seats = self._config.max_num_seqs - taken
        return [*self._receiver.grant(seats, now)]

    def _received(self, instructions: list[ReceiveInstruction], now: float) -> list[object]:
        passed: list[object] = []
        for instruction in instructions:
            if isinstance(instruction, Arrived):
                passed += self._join(instruction, now)
            else:
                passed.append(instruction)
        return passed

    def _join(self, arrived: Arrived, now: float) -> list[object]:
        body = arrived.body
        outputs = [*body.output_ids, *arrived.token_ids]
        if max(outputs) >= self._vocab_size or len(outputs) >= body.sampling.max_tokens:
            self._pool.release(arrived.transfer_id, arrived.blocks)
            reason = f"the prefill side drew {arrived.token_ids[-1]}, which nothing can follow"
            return [self._desk.failed(body, "transfer_failed", reason, retryable=True)]
        deadline_at = arrived.asked_at + body.deadline_in_s
        job = _Job(body, now, deadline_at, started_at=now)
        job.arrived = HopTimes(
            reserve_wait_s=arrived.reserve_wait_s,
            transfer_s=arrived.transfer_s,
            transfer_bytes=arrived.num_bytes,
            transfer_frames=arrived.num_frames,
            codec=RAW,
            transport="zeromq",
        )
        self._jobs[arrived.transfer_id] = job
        sequence = Sequence(
            arrived.transfer_id,
            body.prompt_ids,
            outputs,
            body.sampling,
            body.priority,
            tenant=body.tenant,
            block_table=tuple(arrived.blocks),
            num_computed=len(body.prompt_ids) + len(body.output_ids),
        )
        if body.sampling.constraint is not None:
            return [*self._gate.hold(sequence)]
        self._scheduler.add_computed(sequence)
        return []

    # --- steps --------------------------------------------------------------------------

    def _step(self, now: float) -> list[object]:
        plan = self._scheduler.schedule()
        if plan is None:
            return []
        for chunk in plan.chunks:
            job = self._jobs[chunk.seq_id]
            if job.started_at is None:
                job.started_at = now
        return [RunStep(plan)]

    def _book(self, news: list[NewToken], now: float) -> list[object]:
        for new in news:
            self._new_token(new, now)
        return self._desk.flush()

    def _new_token(self, new: NewToken, now: float) -> None:
        sequence = new.sequence
        job = self._jobs[sequence.seq_id]
        assert job.started_at is not None
        hop = None
        if job.arrived is not None:
            first_step_s = now - job.started_at
            hop = msgspec.structs.replace(job.arrived, first_step_s=first_step_s)
            job.arrived = None
        elif new.place == len(job.body.output_ids):
            hop = HopTimes(
                queued_s=job.started_at - job.arrived_at,
                prefill_s=now - job.started_at,
                num_chunks=sequence.num_chunks,
            )
        if new.finish_reason and sequence.num_preemptions:
            hop = msgspec.structs.replace(hop or HopTimes(), preemptions=sequence.num_preemptions)
        item = TokenItem(
            request_id=job.body.request_id,
            attempt=job.body.attempt,
            seq=new.place,
            token_ids=(new.token_id,),
            logprobs=() if new.logprobs is None else (new.logprobs,),
            finish_reason=new.finish_reason,
            stop_token_id=new.stop_token_id,
            hop=hop,
            prompt_logprobs=new.prompt_logprobs,
        )
        self._desk.put(job.body.router_id, item, now)
        if new.finish_reason:
            del self._jobs[sequence.seq_id]

    def _cannot_go_on(self, failed: FailedSequence) -> list[object]:
        """Before the step is booked: what was drawn for the sequence must not be."""
        job = self._jobs.get(failed.seq_id)
        if job is None:
            return []
        self._drop(failed.seq_id)
        return [self._desk.failed(job.body, failed.code, failed.message, retryable=False)]

    def _step_raised(self, reason: str) -> list[object]:
        return [
            self._desk.step_failed(self._jobs.pop(sequence.seq_id).body, reason)
            for sequence in self._scheduler.abandon_step()
        ]

    # --- time ---------------------------------------------------------------------------

    def _tick(self, now: float) -> list[object]:
        gone, instructions = self._desk.tick(now)
        instructions += self._receiver.tick(now)
        for transfer, body in self._receiver.bodies():
            if body.router_id in gone:
                self._receiver.cancel(transfer, now)
        for seq_id, job in list(self._jobs.items()):
            if job.body.router_id in gone:
                self._drop(seq_id)
            elif now > job.deadline_at:
                self._drop(seq_id)
                instructions.append(self._desk.late(job.body))
        return instructions

    def _holds(self, request_id: str, attempt: int) -> bool:
        wanted = transfer_id(RequestId(request_id), attempt)
        return wanted in self._jobs or wanted in self._receiver

    def report(self, facts: ShellFacts) -> LoadReport:
        scheduler, counts = self._scheduler, self._scheduler.counts
        return LoadReport(
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            role=self._role,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + len(self._gate),
            num_waiting_tokens=scheduler.num_waiting_tokens,
            num_blocks=self._pool.num_blocks,
            num_free_blocks=self._pool.num_free,
            block_size=self._pool.block_size,
            num_transfers=self._receiver.num_open,
            num_parked=0,
            num_preemptions=counts.num_preemptions,
            num_backpressured=counts.num_blocked + self._receiver.num_blocked,
            kv_bytes_sent=facts.kv_bytes_sent,
            kv_bytes_received=facts.kv_bytes_received,
            kv_transport=facts.kv_transport,
            num_leases=self._receiver.num_open,
            num_tasks=facts.num_tasks,
            step_count=scheduler.num_steps,
            integrity_errors=tuple(self._check_integrity()),
            num_swapped_out=counts.num_swapped_out,
            num_cache_queried_tokens=counts.num_cache_queried_tokens,
            num_cache_hit_tokens=counts.num_cache_hit_tokens,
            num_draft_tokens=counts.num_draft_tokens,
            num_accepted_draft_tokens=counts.num_accepted_draft_tokens,
        )

    def _check_integrity(self) -> list[str]:
        """Run when nothing is open: then every block must be free."""
        if self._jobs or self._receiver.num_open or self.has_step_in_flight:
            return []
        problems = self._scheduler.check_integrity()
        if self._pool.owners:
            problems.append(f"blocks left with {sorted(self._pool.owners)[:4]}")
        return problems
