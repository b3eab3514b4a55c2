"""What a prefill worker does when something happens. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from baton.engine.block_pool import BlockPool
from baton.engine.plan import FailedSequence, StepPlan
from baton.engine.scheduler import NewToken, Scheduler
from baton.protocol.ids import RequestId, transfer_id
from baton.protocol.messages import (
    Abort,
    AnyMessage,
    Denied,
    Dispatch,
    Granted,
    KvProgress,
    LoadReport,
    RequestBody,
    TransferAck,
    TransferNack,
    WorkerRef,
)
from baton.worker.admission import refusal
from baton.worker.desk import RouterDesk
from baton.worker.events import (
    FromPeer,
    GrammarFailed,
    GrammarReady,
    LayersDone,
    RunStep,
    ShellFacts,
    StepDone,
    StepRaised,
    StepWanted,
    Tick,
)
from baton.worker.jobs import Jobs, sequence_of, token_item
from baton.worker.load import load_report
from kv_transfer.estimates import ComputeEstimate
from kv_transfer.instructions import SendClosed, SendInstruction
from kv_transfer.sender import Sender, owner_name
from prefill_worker.jobs import PrefillJob
from prefill_worker.layers import StepRows

ROLE = "prefill"
MAX_JOBS = 8_192


@dataclass(frozen=True, slots=True)
class FromDecode:
    """An answer of a decode worker that this worker connected to."""

    decode: WorkerRef
    message: AnyMessage


@dataclass(frozen=True, slots=True)
class DecodeRefused:
    """A decode worker answered our hello with no, or is another incarnation by now."""

    decode: WorkerRef
    reason: str


class PrefillDecider:
    def __init__(
        self,
        worker_id: str,
        incarnation: str,
        pool: BlockPool,
        scheduler: Scheduler,
        sender: Sender,
        vocab_size: int,
        *,
        compute: ComputeEstimate | None = None,
        is_layer_wise: bool = True,
    ) -> None:
        """compute, is_layer_wise: see ``StepRows``."""
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._pool = pool
        self._scheduler = scheduler
        self._sender = sender
        self._vocab_size = vocab_size
        self._desk = RouterDesk(worker_id, incarnation, ROLE, self._holds)
        self._jobs: Jobs[PrefillJob] = Jobs(scheduler)
        self._plan: StepPlan | None = None
        self._rows = StepRows(sender, compute or ComputeEstimate(), is_layer_wise=is_layer_wise)

    @property
    def has_step_in_flight(self) -> bool:
        return self._scheduler.has_step_in_flight

    @property
    def num_open(self) -> int:
        return len(self._jobs) + self._desk.num_streams

    def handle(self, event: object, now: float) -> list[object]:
        return [*self._react(event, now), *self._jobs.deserted_grammars()]

    def _react(self, event: object, now: float) -> list[object]:
        match event:
            case FromPeer(message=message, sender_id=sender_id):
                return self._from_peer(sender_id, message, now)
            case FromDecode(decode, message):
                return self._from_decode(decode, message, now)
            case DecodeRefused(decode, reason):
                return self._sent(self._sender.refused(decode, reason, now), now)
            case StepWanted():
                return self._step(now)
            case StepDone(result):
                assert self._plan is not None
                self._rows.ran(self._plan, result.compute_seconds)
                failed = [i for f in result.failed for i in self._cannot_go_on(f, now)]
                return [*failed, *self._book(self._plan, self._scheduler.complete(result), now)]
            case LayersDone(step, num_layers):
                return self._layers_done(step, num_layers, now)
            case StepRaised():
                return self._step_raised(event, now)
            case GrammarReady(constraint, compiled):
                self._jobs.grammar_ready(constraint, compiled)
                return []
            case GrammarFailed():
                return self._grammar_failed(event)
            case Tick():
                return self._tick(now)
        raise AssertionError(f"unknown event {event!r}")

    # --- messages -----------------------------------------------------------------------

    def _from_peer(self, sender_id: str, message: AnyMessage, now: float) -> list[object]:
        match message:
            case Dispatch(body, decode):
                self._desk.seen(body.router_id, now)
                return self._accept(body, decode, now)
            case Abort(request_id, attempt):
                return self._abort(request_id, attempt, now)
        return self._desk.handle(sender_id, message, now)

    def _from_decode(self, decode: WorkerRef, message: AnyMessage, now: float) -> list[object]:
        sender = self._sender
        match message:
            case Granted():
                return self._sent(sender.granted(message, decode, now), now)
            case KvProgress():
                sender.progressed(message, now)
                return []
            case Denied():
                return self._sent(sender.denied(message, now), now)
            case TransferAck():
                return self._sent(sender.acked(message, now), now)
            case TransferNack():
                return self._sent(sender.nacked(message, now), now)
        return []

    def _accept(self, body: RequestBody, decode: WorkerRef | None, now: float) -> list[object]:
        seq_id = transfer_id(RequestId(body.request_id), body.attempt)
        if self._jobs.is_known(seq_id):
            return []
        if len(self._jobs) >= MAX_JOBS:
            return [
                self._desk.failed(
                    body, "overloaded", f"{MAX_JOBS} requests are open", retryable=True
                )
            ]
        if decode is None:
            reason = "a prefill worker needs a decode worker"
            return [self._desk.failed(body, "internal", reason, retryable=False)]
        kv_tokens = len(body.prompt_ids) + len(body.output_ids)
        reason = refusal(body, kv_tokens, self._pool, self._vocab_size)
        if reason:
            return [self._desk.failed(body, "invalid_request", reason, retryable=False)]
        job = PrefillJob(body, now, now + body.deadline_in_s, decode=decode)
        return [*self._jobs.start(job, sequence_of(seq_id, body))]

    def _abort(self, request_id: str, attempt: int, now: float) -> list[object]:
        self._desk.forget(request_id, attempt)
        doomed = self._jobs.of_request(request_id, attempt)
        return [i for seq_id in doomed for i in self._drop(seq_id, now)]

    def _drop(self, seq_id: str, now: float) -> list[object]:
        self._jobs.drop(seq_id)
        return [*self._sender.cancel(seq_id, now)]

    def _grammar_failed(self, failed: GrammarFailed) -> list[object]:
        return [
            self._desk.failed(job.body, failed.code, failed.message, retryable=failed.retryable)
            for job in self._jobs.grammar_failed(failed.constraint)
        ]

    # --- steps --------------------------------------------------------------------------

    def _step(self, now: float) -> list[object]:
        plan = self._scheduler.schedule()
        if plan is None:
            return []
        self._plan = plan
        instructions: list[object] = []
        for seq_id, job in self._jobs.begin(plan, now):
            if job.goes_on:
                instructions += self._sender.begin(seq_id, job.decode, job.handed_on(now), now)
        instructions += self._sent(self._rows.begun(plan, now), now)
        return [RunStep(plan, self._rows.marks(plan)), *instructions]

    def _layers_done(self, step: int, num_layers: int, now: float) -> list[object]:
        plan = self._plan
        if plan is None or plan.step != step or not self.has_step_in_flight:
            return []
        return self._sent(self._rows.layers_done(plan, num_layers, now), now)

    def _book(self, plan: StepPlan, news: list[NewToken], now: float) -> list[object]:
        instructions: list[object] = []
        drawn = {n.sequence.seq_id: n for n in news}
        for chunk in plan.chunks:
            new = drawn.get(chunk.seq_id)
            if new is not None:
                instructions += self._first_token(new, now)
            elif chunk.seq_id in self._sender:
                instructions += self._sent(self._rows.chunk_done(chunk, now), now)
        return [*self._desk.flush(), *instructions]

    def _first_token(self, new: NewToken, now: float) -> list[object]:
        sequence = new.sequence
        seq_id = sequence.seq_id
        job = self._jobs[seq_id]
        item = token_item(job.body, new, job.hop_times(sequence, now))
        self._desk.put(job.body.router_id, item, now)
        if new.finish_reason:
            self._jobs.end(seq_id)
            return [*self._sender.cancel(seq_id, now)]
        num_computed = sequence.num_computed
        blocks = tuple(self._scheduler.take_blocks(sequence, owner_name(seq_id)))
        return [
            *self._sent(self._sender.computed(seq_id, blocks, num_computed, now), now),
            *self._sent(self._sender.prefill_done(seq_id, (new.token_id,), now), now),
        ]

    def _cannot_go_on(self, failed: FailedSequence, now: float) -> list[object]:
        """Before the step is booked: what was drawn for the sequence must not be."""
        if failed.retryable:
            self._jobs.doubt(failed.seq_id)
        if failed.seq_id not in self._jobs:
            return []
        said = self._desk.cannot_go_on(self._jobs[failed.seq_id].body, failed)
        return [*self._drop(failed.seq_id, now), said]

    def _step_raised(self, raised: StepRaised, now: float) -> list[object]:
        instructions: list[object] = []
        for seq_id, job in self._jobs.abandon_step():
            instructions += self._sender.cancel(seq_id, now)
            instructions.append(self._desk.step_failed(job.body, seq_id, raised))
        return instructions

    # --- transfers and time -------------------------------------------------------------

    def _sent(self, instructions: list[SendInstruction], now: float) -> list[object]:
        """Pass a sender's instructions on, but settle the transfers that closed."""
        passed: list[object] = []
        for instruction in instructions:
            if not isinstance(instruction, SendClosed):
                passed.append(instruction)
                continue
            job = self._jobs.end(instruction.transfer_id)
            if instruction.error_code:
                self._scheduler.drop(instruction.transfer_id)
                failed = self._desk.failed(
                    job.body,
                    instruction.error_code,
                    instruction.message,
                    retryable=instruction.retryable,
                    suspect=instruction.suspect,
                    hop="transfer",
                )
                passed.append(failed)
        return passed

    def _tick(self, now: float) -> list[object]:
        gone, instructions = self._desk.tick(now)
        instructions += self._sender.tick(now)
        for seq_id, is_late in self._jobs.lapsed(gone, now):
            job = self._jobs[seq_id]
            instructions += self._drop(seq_id, now)
            if is_late:
                instructions.append(self._desk.late(job.body))
        return instructions

    def _holds(self, request_id: str, attempt: int) -> bool:
        return transfer_id(RequestId(request_id), attempt) in self._jobs

    def report(self, facts: ShellFacts) -> LoadReport:
        return load_report(
            self._worker_id,
            self._incarnation,
            ROLE,
            self._scheduler,
            facts,
            num_at_gate=self._jobs.num_at_gate,
            num_transfers=self._sender.num_open,
            num_parked=self._sender.num_parked,
            num_reservations_blocked=0,
            is_idle=not (self._jobs or self.has_step_in_flight),
        )
