"""What a decode (or mixed) worker does when something happens. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from baton.engine.block_pool import BlockPool
from baton.engine.plan import FailedSequence
from baton.engine.scheduler import NewToken, Scheduler
from baton.protocol.config import EngineConfig
from baton.protocol.ids import RequestId, transfer_id
from baton.protocol.messages import (
    Abort,
    AnyMessage,
    Denied,
    Dispatch,
    KvFrame,
    LeaseRenew,
    LoadReport,
    RequestBody,
    Reserve,
    TransferCancel,
    TransferEnd,
)
from baton.worker.admission import refusal
from baton.worker.desk import RouterDesk
from baton.worker.events import (
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
from baton.worker.jobs import Jobs, sequence_of, token_item
from baton.worker.load import load_report
from decode_worker.handover import DecodeJob, arrived_job, hop_times, nothing_follows
from kv_transfer.instructions import Arrived, ReceiveInstruction, ToPrefill
from kv_transfer.receiver import Receiver

MAX_JOBS = 16_384


@dataclass(frozen=True, slots=True)
class FrameArrived:
    """``checksum``: ``frame_checksum`` of what came. The payload itself stays with the shell."""

    frame: KvFrame
    num_bytes: int
    checksum: int
    transport: str = ""


@dataclass(frozen=True, slots=True)
class KvWritten:
    """A WriteKv has ended. ``problem``: why the frame did not decode, or ""."""

    frame: KvFrame
    seconds: float
    problem: str = ""


@dataclass(frozen=True, slots=True)
class EndArrived:
    end: TransferEnd


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
        self._jobs: Jobs[DecodeJob] = Jobs(scheduler)

    @property
    def has_step_in_flight(self) -> bool:
        return self._scheduler.has_step_in_flight

    @property
    def num_open(self) -> int:
        return len(self._jobs) + self._receiver.num_open + self._desk.num_streams

    def handle(self, event: object, now: float) -> list[object]:
        reaction = self._react(event, now)
        return [*reaction, *self._jobs.deserted_grammars(), *self._grant(now)]

    def _react(self, event: object, now: float) -> list[object]:
        match event:
            case FromPeer(peer_key, sender_id, _, message):
                return self._from_peer(peer_key, sender_id, message, now)
            case FrameArrived(frame, num_bytes, checksum, transport):
                return [*self._receiver.frame(frame, num_bytes, checksum, now, transport)]
            case KvWritten(frame, seconds, problem):
                return self._received(self._receiver.written(frame, seconds, problem, now), now)
            case EndArrived(end):
                return self._received(self._receiver.end(end, now), now)
            case StepWanted():
                return self._step(now)
            case StepDone(result):
                failed = [i for f in result.failed for i in self._cannot_go_on(f)]
                return [*failed, *self._book(self._scheduler.complete(result), now)]
            case StepRaised():
                return self._step_raised(event)
            case GrammarReady(constraint, compiled):
                self._jobs.grammar_ready(constraint, compiled)
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
                self._cancel_transfer(transfer, now)
            case _:
                return self._desk.handle(sender_id, message, now)
        return []

    def _accept(self, body: RequestBody, now: float) -> list[object]:
        """Both phases here."""
        seq_id = transfer_id(RequestId(body.request_id), body.attempt)
        if self._jobs.is_known(seq_id):
            return []
        code, reason, retryable = self._refusal(body)
        if code:
            return [self._desk.failed(body, code, reason, retryable=retryable)]
        job = DecodeJob(body, now, now + body.deadline_in_s)
        return [*self._jobs.start(job, sequence_of(seq_id, body))]

    def _reserve(self, peer_key: str, ask: Reserve, now: float) -> list[object]:
        self._desk.seen(ask.body.router_id, now)
        transfer = ask.transfer_id
        if self._jobs.is_known(transfer):
            return []
        code, reason, retryable = self._refusal(ask.body)
        if not code and transfer != transfer_id(RequestId(ask.body.request_id), ask.body.attempt):
            code, reason = "invalid_request", "the transfer id does not belong to the request"
        if code:
            return [ToPrefill(peer_key, Denied(transfer, code, reason, retryable))]
        answers = self._receiver.reserve(peer_key, ask, now)
        constraint = ask.body.sampling.constraint
        if constraint is None or transfer not in self._receiver:
            return [*answers]
        return [*self._jobs.expect_grammar(transfer, constraint), *answers]

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
        for seq_id in self._jobs.of_request(request_id, attempt):
            self._jobs.drop(seq_id)
        for transfer, body in self._receiver.bodies():
            if body.request_id == request_id and body.attempt <= attempt:
                self._cancel_transfer(transfer, now)

    def _cancel_transfer(self, transfer: str, now: float) -> None:
        self._receiver.cancel(transfer, now)
        self._jobs.expect_no_more(transfer)

    def _grammar_failed(self, failed: GrammarFailed) -> list[object]:
        return [
            self._desk.failed(job.body, failed.code, failed.message, retryable=failed.retryable)
            for job in self._jobs.grammar_failed(failed.constraint)
        ]

    # --- transfers ----------------------------------------------------------------------

    def _grant(self, now: float) -> list[object]:
        """Preempted sequences come back before anything new is let in."""
        if self._scheduler.num_waiting:
            return []
        taken = self._scheduler.num_running + self._jobs.num_at_gate_with_blocks
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
        reason = nothing_follows(arrived, self._vocab_size)
        if reason:
            self._pool.release(arrived.transfer_id, arrived.blocks)
            self._jobs.expect_no_more(arrived.transfer_id)
            return [self._desk.failed(arrived.body, "transfer_failed", reason, retryable=True)]
        return [*self._jobs.start(*arrived_job(arrived, now))]

    # --- steps --------------------------------------------------------------------------

    def _step(self, now: float) -> list[object]:
        plan = self._scheduler.schedule()
        if plan is None:
            return []
        self._jobs.begin(plan, now)
        return [RunStep(plan)]

    def _book(self, news: list[NewToken], now: float) -> list[object]:
        for new in news:
            seq_id = new.sequence.seq_id
            job = self._jobs[seq_id]
            item = token_item(job.body, new, hop_times(job, new, now))
            self._desk.put(job.body.router_id, item, now)
            if new.finish_reason:
                self._jobs.end(seq_id)
        return self._desk.flush()

    def _cannot_go_on(self, failed: FailedSequence) -> list[object]:
        """Before the step is booked: what was drawn for the sequence must not be."""
        if failed.retryable:
            self._jobs.doubt(failed.seq_id)
        if failed.seq_id not in self._jobs:
            return []
        return [self._desk.cannot_go_on(self._jobs.drop(failed.seq_id).body, failed)]

    def _step_raised(self, raised: StepRaised) -> list[object]:
        return [
            self._desk.step_failed(job.body, seq_id, raised)
            for seq_id, job in self._jobs.abandon_step()
        ]

    # --- time ---------------------------------------------------------------------------

    def _tick(self, now: float) -> list[object]:
        gone, instructions = self._desk.tick(now)
        instructions += self._receiver.tick(now)
        for transfer, body in self._receiver.bodies():
            if body.router_id in gone:
                self._receiver.cancel(transfer, now)
        for transfer in self._jobs.expected:
            if transfer not in self._receiver:
                self._jobs.expect_no_more(transfer)
        for seq_id, is_late in self._jobs.lapsed(gone, now):
            job = self._jobs.drop(seq_id)
            if is_late:
                instructions.append(self._desk.late(job.body))
        return instructions

    def _holds(self, request_id: str, attempt: int) -> bool:
        wanted = transfer_id(RequestId(request_id), attempt)
        return wanted in self._jobs or wanted in self._receiver

    def report(self, facts: ShellFacts) -> LoadReport:
        num_transfers = self._receiver.num_open
        return load_report(
            self._worker_id,
            self._incarnation,
            self._role,
            self._scheduler,
            facts,
            num_at_gate=self._jobs.num_at_gate,
            num_transfers=num_transfers,
            num_parked=0,
            num_reservations_blocked=self._receiver.num_blocked,
            is_idle=not (self._jobs or num_transfers or self.has_step_in_flight),
        )
