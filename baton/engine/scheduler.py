"""Which tokens of which sequences the next step runs: continuous batching over KV blocks.

Pure: no torch, no clock. Prefill, decode and recompute after a preemption are one thing
here, as in vLLM's V1 scheduler: a sequence knows ``tokens`` and has KV for the first
``num_computed``; a step runs some of the rest, and draws a token when it runs all of it.

Running sequences come first, so a prompt's chunks never stall a decode (Sarathi-Serve,
section 4); waiting ones are admitted whole (blocks for all tokens they know), so that two
half-admitted prompts cannot starve each other. When a running sequence cannot grow, the
least urgent one is preempted: its blocks go, and it waits to be recomputed.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Literal

from baton.engine.block_pool import BlockPool
from baton.engine.plan import SampledToken, SequenceChunk, StepPlan, StepResult
from baton.protocol.config import EngineConfig
from baton.protocol.sampling import SamplingParams, TokenLogprobs

FinishReason = Literal["", "stop", "length"]


@dataclass(slots=True)
class Sequence:
    """One attempt at one request. ``prompt_ids`` never change; ``output_ids`` grow.

    priority: the lower runs first (vLLM's convention); equal ones in order of arrival.
    """

    seq_id: str
    prompt_ids: tuple[int, ...]
    output_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    order: int = 0
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_chunks: int = 0
    num_preemptions: int = 0
    is_dropped: bool = False
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Of the prompt tokens behind the first, as far as computed; None when nobody asked. A
    sequence that asks must compute its whole prompt: no cached prefix has them."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        cut = len(self.prompt_ids)
        if stop <= cut:
            return self.prompt_ids[start:stop]
        return self.prompt_ids[start:cut] + tuple(self.output_ids[max(0, start - cut) : stop - cut])

    @property
    def urgency(self) -> tuple[int, int]:
        return (self.priority, self.order)


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token drawn for a sequence, and whether it was the last one."""

    sequence: Sequence
    token_id: int
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason
    stop_token_id: int
    """-1 unless one of the request's own stop_token_ids ended it."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """With a sequence's first token, when it asked for them."""


@dataclass(frozen=True, slots=True)
class SchedulerCounts:
    num_preemptions: int
    num_blocked: int
    """Steps at which the most urgent waiting sequence did not fit into the free blocks."""


class Scheduler:
    """One step is in flight at a time: ``schedule``, run it, ``complete``, again.

    Blocks of a sequence dropped meanwhile stay its own until ``complete``: the engine may
    still be writing to them.
    """

    def __init__(
        self, pool: BlockPool, config: EngineConfig, eos_token_ids: frozenset[int]
    ) -> None:
        self.pool = pool
        self._config = config
        self._eos_token_ids = eos_token_ids
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[tuple[tuple[int, int], str]] = []
        self._running: list[Sequence] = []
        self._in_flight: StepPlan | None = None
        self._num_steps = 0
        self._num_arrived = 0
        self._num_preemptions = 0
        self._num_blocked = 0
        self._gone: list[str] = []
        self._watermark_blocks = int(config.watermark * pool.num_blocks)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._sequences) - len(self._running)

    @property
    def num_waiting_tokens(self) -> int:
        running = {s.seq_id for s in self._running}
        return sum(s.num_tokens for s in self._sequences.values() if s.seq_id not in running)

    @property
    def counts(self) -> SchedulerCounts:
        return SchedulerCounts(self._num_preemptions, self._num_blocked)

    @property
    def has_step_in_flight(self) -> bool:
        return self._in_flight is not None

    @property
    def num_steps(self) -> int:
        return self._num_steps

    def get(self, seq_id: str) -> Sequence | None:
        return self._sequences.get(seq_id)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose KV is to be computed here."""
        assert not sequence.block_table
        if sequence.sampling.num_prompt_logprobs >= 0 and not sequence.output_ids:
            sequence.prompt_logprobs = []
        self._register(sequence)
        heapq.heappush(self._waiting, (sequence.urgency, sequence.seq_id))

    def add_computed(self, sequence: Sequence) -> None:
        """Join a sequence whose blocks (owned under its seq_id) hold KV of ``num_computed``."""
        assert sequence.block_table
        assert sequence.num_computed == sequence.num_tokens - 1
        self._register(sequence)
        self._running.append(sequence)

    def _register(self, sequence: Sequence) -> None:
        assert sequence.seq_id not in self._sequences, f"{sequence.seq_id} is here already"
        sequence.order = self._num_arrived
        self._num_arrived += 1
        self._sequences[sequence.seq_id] = sequence

    def drop(self, seq_id: str) -> bool:
        """Forget a sequence and free its blocks, at once or when its step completes."""
        sequence = self._sequences.get(seq_id)
        if sequence is None or sequence.is_dropped:
            return False
        if self._is_in_flight(seq_id):
            sequence.is_dropped = True
        else:
            self._remove(sequence)
            self._free(sequence)
        return True

    def take_blocks(self, sequence: Sequence, heir: str) -> list[int]:
        """End a sequence here but keep its KV: the blocks go to ``heir``."""
        self._remove(sequence)
        blocks, sequence.block_table = sequence.block_table, []
        self.pool.hand_over(sequence.seq_id, heir, blocks)
        return blocks

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can run now."""
        assert self._in_flight is None, "one step at a time"
        budget = self._config.max_num_batched_tokens
        chunks: list[SequenceChunk] = []
        num_preempted = self._num_preemptions
        for sequence in sorted(self._running, key=lambda s: s.urgency):
            if budget == 0 or not sequence.block_table:
                continue
            count = min(sequence.num_tokens - sequence.num_computed, budget)
            if self._grow(sequence, sequence.num_computed + count):
                chunks.append(self._chunk(sequence, count))
                budget -= count
        if self._num_preemptions == num_preempted:
            self._admit(budget, chunks)
        if not chunks:
            return None
        self._num_steps += 1
        gone, self._gone = tuple(self._gone), []
        self._in_flight = StepPlan(self._num_steps, tuple(chunks), gone)
        return self._in_flight

    def _admit(self, budget: int, chunks: list[SequenceChunk]) -> None:
        while budget > 0 and len(self._running) < self._config.max_num_seqs:
            sequence = self._peek_waiting()
            if sequence is None:
                return
            need = self.pool.blocks_for(sequence.num_tokens)
            spare = self._watermark_blocks if self._running else 0
            if need + spare > self.pool.num_free:
                self._num_blocked += 1
                return
            heapq.heappop(self._waiting)
            sequence.block_table = self.pool.allocate(sequence.seq_id, need)
            self._running.append(sequence)
            count = min(sequence.num_tokens, budget)
            chunks.append(self._chunk(sequence, count))
            budget -= count

    def _peek_waiting(self) -> Sequence | None:
        while self._waiting:
            urgency, seq_id = self._waiting[0]
            sequence = self._sequences.get(seq_id)
            if sequence is not None and sequence.urgency == urgency:
                return sequence
            heapq.heappop(self._waiting)
        return None

    def _chunk(self, sequence: Sequence, count: int) -> SequenceChunk:
        start = sequence.num_computed
        asks = sequence.prompt_logprobs is not None and start + 1 < len(sequence.prompt_ids)
        return SequenceChunk(
            seq_id=sequence.seq_id,
            token_ids=sequence.tokens(start, start + count),
            start=start,
            block_table=tuple(sequence.block_table[: self.pool.blocks_for(start + count)]),
            samples=start + count == sequence.num_tokens,
            sampling=sequence.sampling,
            prompt_ids=sequence.prompt_ids,
            output_ids=sequence.output_ids,
            num_prompt_logprobs=sequence.sampling.num_prompt_logprobs if asks else -1,
        )

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give ``sequence`` blocks for ``num_tokens``, at the cost of less urgent ones."""
        need = self.pool.blocks_for(num_tokens) - len(sequence.block_table)
        while need > self.pool.num_free:
            victim = max(
                (s for s in self._running if s.block_table),
                key=lambda s: s.urgency,
            )
            self._preempt(victim)
            if victim is sequence:
                return False
        if need > 0:
            sequence.block_table += self.pool.allocate(sequence.seq_id, need)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self._num_preemptions += 1
        victim.num_preemptions += 1
        self._running.remove(victim)
        self._free(victim)
        heapq.heappush(self._waiting, (victim.urgency, victim.seq_id))

    def complete(self, result: StepResult) -> list[NewToken]:
        """Book the step in flight. Finished sequences are gone from here, their blocks free."""
        plan = self._in_flight
        assert plan is not None
        assert plan.step == result.step
        self._in_flight = None
        drawn: dict[str, SampledToken] = {s.seq_id: s for s in result.sampled}
        for part in result.prompt_logprobs:
            found = self._sequences[part.seq_id].prompt_logprobs
            assert found is not None
            found[part.start - 1 :] = part.logprobs
        news: list[NewToken] = []
        for chunk in plan.chunks:
            sequence = self._sequences[chunk.seq_id]
            if sequence.is_dropped:
                self._remove(sequence)
                self._free(sequence)
                continue
            sequence.num_computed = chunk.start + len(chunk.token_ids)
            sequence.num_chunks += 1
            if chunk.samples:
                news.append(self._append(sequence, drawn[chunk.seq_id]))
        return news

    def _append(self, sequence: Sequence, drawn: SampledToken) -> NewToken:
        sequence.output_ids.append(drawn.token_id)
        sampling = sequence.sampling
        reason: FinishReason = ""
        stop_token_id = -1
        if drawn.token_id in sampling.stop_token_ids:
            reason, stop_token_id = "stop", drawn.token_id
        elif drawn.token_id in self._eos_token_ids and not sampling.ignore_eos:
            reason = "stop"
        elif len(sequence.output_ids) >= sampling.max_tokens:
            reason = "length"
        if reason:
            self._remove(sequence)
            self._free(sequence)
        prompt_logprobs = tuple(sequence.prompt_logprobs or ())
        sequence.prompt_logprobs = None
        return NewToken(
            sequence, drawn.token_id, drawn.logprobs, reason, stop_token_id, prompt_logprobs
        )

    def abandon_step(self) -> list[Sequence]:
        """The step in flight raised: drop its sequences and return those not dropped before."""
        plan = self._in_flight
        assert plan is not None
        self._in_flight = None
        failed = []
        for chunk in plan.chunks:
            sequence = self._sequences[chunk.seq_id]
            if not sequence.is_dropped:
                failed.append(sequence)
            self._remove(sequence)
            self._free(sequence)
        return failed

    def _is_in_flight(self, seq_id: str) -> bool:
        plan = self._in_flight
        return plan is not None and any(c.seq_id == seq_id for c in plan.chunks)

    def _remove(self, sequence: Sequence) -> None:
        del self._sequences[sequence.seq_id]
        self._gone.append(sequence.seq_id)
        if sequence in self._running:
            self._running.remove(sequence)

    def _free(self, sequence: Sequence) -> None:
        blocks, sequence.block_table = sequence.block_table, []
        self.pool.release(sequence.seq_id, blocks)
        sequence.num_computed = 0

    def check_integrity(self) -> list[str]:
        problems = self.pool.check_integrity()
        for sequence in self._running:
            if self._sequences.get(sequence.seq_id) is not sequence:
                problems.append(f"{sequence.seq_id} runs but is not registered")
        queued = {seq_id for _, seq_id in self._waiting}
        running = {s.seq_id for s in self._running}
        for seq_id in self._sequences:
            if seq_id not in queued and seq_id not in running:
                problems.append(f"{seq_id} neither waits nor runs")
        return problems
