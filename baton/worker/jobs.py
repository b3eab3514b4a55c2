"""The requests that a worker has taken in, each from its dispatch or arrival to its end here. Pure.

A job's sequence is at the grammar gate, with the scheduler, or, where its KV is being handed
over, with neither. One of these in each worker's decider.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

from baton.engine.plan import StepPlan
from baton.engine.scheduler import NewToken, Scheduler, Sequence
from baton.protocol.block_hash import classes_for
from baton.protocol.constraint import Constraint
from baton.protocol.messages import HopTimes, RequestBody, TokenItem
from baton.worker.events import CompileGrammar, ForgetGrammar
from baton.worker.grammar_gate import GrammarGate


@dataclass(slots=True)
class Job:
    """Times are ``now`` of the decider; ``started_at`` is None until a step runs it."""

    body: RequestBody
    arrived_at: float
    deadline_at: float
    started_at: float | None = None


JobT = TypeVar("JobT", bound=Job)


class Jobs(Generic[JobT]):
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._gate = GrammarGate()
        self._jobs: dict[str, JobT] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, seq_id: str) -> bool:
        return seq_id in self._jobs

    def __getitem__(self, seq_id: str) -> JobT:
        return self._jobs[seq_id]

    @property
    def num_at_gate(self) -> int:
        return len(self._gate)

    @property
    def num_at_gate_with_blocks(self) -> int:
        return self._gate.num_with_blocks

    def is_known(self, seq_id: str) -> bool:
        """Also one that was dropped, while a step in flight still runs it."""
        return seq_id in self._jobs or self._scheduler.get(seq_id) is not None

    def start(self, job: JobT, sequence: Sequence) -> list[CompileGrammar]:
        """Schedule it, now or once its grammar is there. It may own blocks already."""
        self._jobs[sequence.seq_id] = job
        if sequence.sampling.constraint is not None:
            return self._gate.hold(sequence)
        self._schedule(sequence)
        return []

    def grammar_ready(self, constraint: Constraint, compiled: object) -> None:
        for sequence in self._gate.open(constraint, compiled):
            self._schedule(sequence)

    def grammar_failed(self, constraint: Constraint) -> list[JobT]:
        """End the jobs that waited for it, and return them in order of arrival."""
        waited = self._gate.open(constraint)
        for sequence in waited:
            self._scheduler.pool.release(sequence.seq_id, sequence.block_table)
        return [self._jobs.pop(sequence.seq_id) for sequence in waited]

    def expect_grammar(self, seq_id: str, constraint: Constraint) -> list[CompileGrammar]:
        """Have it compiled while KV is on its way, until the job starts or ``expect_no_more``."""
        return self._gate.expect(seq_id, constraint)

    def expect_no_more(self, seq_id: str) -> None:
        """Its KV does not come. One that is here stays: word of an end may come after it."""
        if seq_id not in self._gate:
            self._gate.drop(seq_id)

    @property
    def expected(self) -> list[str]:
        """Those whose grammar is being compiled while their KV is on its way."""
        return self._gate.expected

    def deserted_grammars(self) -> list[ForgetGrammar]:
        """That nobody waits for since the last time: to be passed on behind every event."""
        return self._gate.deserted()

    def begin(self, plan: StepPlan, now: float) -> list[tuple[str, JobT]]:
        """Those that a step runs for the first time, in the order of its chunks."""
        ids = [chunk.seq_id for chunk in plan.chunks]
        begun = [(seq_id, self._jobs[seq_id]) for seq_id in ids]
        begun = [(seq_id, job) for seq_id, job in begun if job.started_at is None]
        for _, job in begun:
            job.started_at = now
        return begun

    def end(self, seq_id: str) -> JobT:
        """Its sequence is nobody's concern any more: the caller knows where it went."""
        return self._jobs.pop(seq_id)

    def drop(self, seq_id: str) -> JobT:
        """End it with its sequence, wherever that is."""
        held = self._gate.drop(seq_id)
        if held is None:
            self._scheduler.drop(seq_id)
        else:
            self._scheduler.pool.release(seq_id, held.block_table)
        return self._jobs.pop(seq_id)

    def doubt(self, seq_id: str) -> None:
        """What was computed for it may be wrong: no other sequence is to find its blocks."""
        sequence = self._scheduler.get(seq_id)
        if sequence is not None:
            self._scheduler.pool.forget(sequence.block_table)

    def abandon_step(self) -> list[tuple[str, JobT]]:
        """End those that ran in a step that raised."""
        dropped = self._scheduler.abandon_step()
        return [(sequence.seq_id, self._jobs.pop(sequence.seq_id)) for sequence in dropped]

    def of_request(self, request_id: str, attempt: int) -> list[str]:
        """Sequences of that attempt and older ones."""
        return [
            seq_id
            for seq_id, job in self._jobs.items()
            if job.body.request_id == request_id and job.body.attempt <= attempt
        ]

    def lapsed(self, gone: Collection[str], now: float) -> list[tuple[str, bool]]:
        """Sequences whose router is ``gone``, and with True those that are late otherwise."""
        return [
            (seq_id, job.body.router_id not in gone)
            for seq_id, job in self._jobs.items()
            if job.body.router_id in gone or now > job.deadline_at
        ]

    def _schedule(self, sequence: Sequence) -> None:
        if sequence.block_table:
            self._scheduler.add_computed(sequence)
        else:
            self._scheduler.add(sequence)


def sequence_of(seq_id: str, body: RequestBody) -> Sequence:
    """With nothing computed."""
    return Sequence(
        seq_id,
        body.prompt_ids,
        list(body.output_ids),
        body.sampling,
        body.priority,
        tenant=body.tenant,
        accepts=classes_for(body.kv_quality),
    )


def token_item(body: RequestBody, new: NewToken, hop: HopTimes | None) -> TokenItem:
    return TokenItem(
        request_id=body.request_id,
        attempt=body.attempt,
        seq=new.place,
        token_ids=(new.token_id,),
        logprobs=() if new.logprobs is None else (new.logprobs,),
        finish_reason=new.finish_reason,
        stop_token_id=new.stop_token_id,
        hop=hop,
        prompt_logprobs=new.prompt_logprobs,
    )
