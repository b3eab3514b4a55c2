"""Which tokens of which sequences the next step runs: continuous batching over KV blocks.

Pure: no torch, no clock. Prefill, decode and recompute after a preemption are one thing
here, as in vLLM's V1 scheduler: a sequence knows ``tokens`` and has KV for the first
``num_computed``; a step runs some of the rest, and draws a token when it runs all of it.

Sequences that run one token come first, so a prompt's chunks never stall a decode
(Sarathi-Serve, section 4); what is left of the token budget goes to prompts, to the last
token. Waiting ones are admitted whole (blocks for all tokens they know), so that two
half-admitted prompts cannot starve each other. When a running sequence cannot grow, the
least urgent one is preempted: its blocks go, and it waits to be recomputed or copied back.
"""

from __future__ import annotations

from collections.abc import Iterable

from baton.engine.block_pool import BlockPool
from baton.engine.host_swap import HostSwap
from baton.engine.plan import SampledToken, SequenceChunk, StepPlan, StepResult
from baton.engine.preemption import EngineRates
from baton.engine.prefix_cache import NOTHING, PrefixCache
from baton.engine.running_set import RunningSet
from baton.engine.sequence import FinishReason, NewToken, SchedulerCounts, Sequence
from baton.engine.wait_queue import WaitQueue
from baton.protocol.block_hash import BlockKey
from baton.protocol.config import EngineConfig

__all__ = ["FinishReason", "NewToken", "Scheduler", "SchedulerCounts", "Sequence"]


class Scheduler:
    """One step is in flight at a time: ``schedule``, run it, ``complete``, again.

    Blocks of a sequence dropped meanwhile stay its own until ``complete``: the engine may
    still be writing to them. block_bytes: of one KV block, all layers (for ``swap_blocks``).
    """

    def __init__(
        self,
        pool: BlockPool,
        config: EngineConfig,
        eos_token_ids: frozenset[int],
        *,
        block_bytes: int = 0,
    ) -> None:
        self.pool = pool
        self._config = config
        self._eos_token_ids = eos_token_ids
        self._sequences: dict[str, Sequence] = {}
        self._waiting = WaitQueue()
        self._running = RunningSet()
        self._cache = PrefixCache(pool) if config.prefix_cache else None
        self._swap = HostSwap(pool, config.swap_blocks, block_bytes) if config.swap_blocks else None
        self._in_flight: StepPlan | None = None
        self._batch: list[Sequence] = []
        """The sequences of the step in flight, in the order of its chunks."""
        self._batch_ids: frozenset[str] = frozenset()
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
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        return self._waiting.num_tokens

    @property
    def counts(self) -> SchedulerCounts:
        cache, swap = self._cache, self._swap
        return SchedulerCounts(
            num_preemptions=self._num_preemptions,
            num_blocked=self._num_blocked,
            num_swapped_out=swap.num_swapped_out if swap else 0,
            num_cache_queried_tokens=cache.num_queried_tokens if cache else 0,
            num_cache_hit_tokens=cache.num_hit_tokens if cache else 0,
        )

    @property
    def has_step_in_flight(self) -> bool:
        return self._in_flight is not None

    @property
    def num_steps(self) -> int:
        return self._num_steps

    def set_rates(self, rates: EngineRates) -> None:
        """What the shell measured before there were steps to measure."""
        if self._swap is not None:
            self._swap.rates = rates

    def get(self, seq_id: str) -> Sequence | None:
        return self._sequences.get(seq_id)

    # --- coming and going ---------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose KV is to be computed here."""
        assert not sequence.block_table
        if sequence.sampling.num_prompt_logprobs >= 0 and not sequence.output_ids:
            sequence.prompt_logprobs = []
        self._register(sequence)
        self._waiting.push(sequence)

    def add_computed(self, sequence: Sequence) -> None:
        """Join a sequence whose blocks (owned under its seq_id) hold KV of ``num_computed``."""
        assert sequence.block_table
        assert sequence.num_computed == sequence.num_tokens - 1
        self._register(sequence)
        if self._cache is not None:
            self._cache.received(sequence)
        self._running.add(sequence)

    def _register(self, sequence: Sequence) -> None:
        assert sequence.seq_id not in self._sequences, f"{sequence.seq_id} is here already"
        sequence.arrived(self._num_arrived)
        self._num_arrived += 1
        self._sequences[sequence.seq_id] = sequence

    def drop(self, seq_id: str) -> bool:
        """Forget a sequence and free its blocks, at once or when its step completes."""
        sequence = self._sequences.get(seq_id)
        if sequence is None or sequence.is_dropped:
            return False
        if seq_id in self._ids_in_flight():
            sequence.is_dropped = True
        else:
            self._remove(sequence)
            self._free(sequence)
        return True

    def take_blocks(self, sequence: Sequence, heir: str) -> list[int]:
        """End a sequence here but keep its KV: the blocks go to ``heir``."""
        self._remove(sequence)
        blocks, sequence.block_table = list(sequence.block_table), ()
        self.pool.hand_over(sequence.seq_id, heir, blocks)
        return blocks

    def _ids_in_flight(self) -> frozenset[str]:
        if self._in_flight is not None and not self._batch_ids:
            self._batch_ids = frozenset(s.seq_id for s in self._batch)
        return self._batch_ids

    def _remove(self, sequence: Sequence) -> None:
        del self._sequences[sequence.seq_id]
        self._gone.append(sequence.seq_id)
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self._stop(sequence)

    def _stop(self, sequence: Sequence) -> None:
        """It runs no more: whoever waits for what it was to compute may look again."""
        self._running.remove(sequence)
        if self._cache is not None:
            self._wake(self._cache.left(sequence))

    def _wake(self, keys: Iterable[BlockKey]) -> None:
        for key in keys:
            self._waiting.wake(key)

    def _free(self, sequence: Sequence) -> None:
        blocks, sequence.block_table = sequence.block_table, ()
        self.pool.release(sequence.seq_id, blocks)
        sequence.num_computed = sequence.num_named = 0
        if self._swap is not None:
            self._swap.drop(sequence)

    # --- a step -------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can run now."""
        assert self._in_flight is None, "one step at a time"
        budget = self._config.max_num_batched_tokens
        num_preempted = self._num_preemptions
        size = self.pool.block_size
        chunks: list[SequenceChunk] = []
        self._batch = []
        prompts: list[Sequence] = []
        for sequence in self._running.in_order():
            if sequence.num_tokens - sequence.num_computed > 1:
                prompts.append(sequence)
            elif budget > 0 and sequence.block_table:
                has_room = len(sequence.block_table) * size > sequence.num_computed
                if has_room or self._grow(sequence):
                    chunks.append(self._chunk(sequence, 1))
                    budget -= 1
        for sequence in prompts:
            if budget > 0 and sequence.block_table:
                budget -= self._add_prompt(sequence, budget, chunks)
        if self._num_preemptions == num_preempted:
            self._admit(budget, chunks)
        swap_out, swap_in = self._swap.planned() if self._swap else ((), ())
        if not chunks and not swap_out:
            return None
        self._num_steps += 1
        gone, self._gone = tuple(self._gone), []
        self._in_flight = StepPlan(self._num_steps, tuple(chunks), gone, swap_out, swap_in)
        return self._in_flight

    def _add_prompt(self, sequence: Sequence, budget: int, chunks: list[SequenceChunk]) -> int:
        """Its next tokens, as many as the budget has; their number."""
        count = min(sequence.num_tokens - sequence.num_computed, budget)
        chunks.append(self._chunk(sequence, count))
        return count

    def _admit(self, budget: int, chunks: list[SequenceChunk]) -> None:
        seats = self._config.max_num_seqs
        while budget > 0 and len(self._running) < seats:
            sequence = self._waiting.peek()
            # Each look at a parked one costs time: no more of them than could ever run.
            if sequence is None or self._waiting.num_parked >= seats:
                return
            found = NOTHING if self._cache is None else self._cache.find(sequence)
            if found.awaited is not None and not sequence.host_blocks:
                self._waiting.park(sequence, found.awaited)
                continue
            if not self._fits(sequence, found.blocks):
                self._num_blocked += 1
                return
            self._waiting.remove(sequence)
            self._seat(sequence, found.blocks)
            budget -= self._add_prompt(sequence, budget, chunks)

    def _fits(self, sequence: Sequence, found: tuple[int, ...]) -> bool:
        """Found blocks that nobody holds count as free, but are not free for the rest."""
        need = self.pool.blocks_for(sequence.num_tokens) - len(found)
        unheld = sum(self.pool.num_holders(block) == 0 for block in found)
        spare = self._watermark_blocks if self._running else 0
        return need + unheld + spare <= self.pool.num_free

    def _seat(self, sequence: Sequence, found: tuple[int, ...]) -> None:
        """Give it its blocks, and KV for as many of its tokens as there is somewhere."""
        need = self.pool.blocks_for(sequence.num_tokens) - len(found)
        self.pool.share(sequence.seq_id, found)
        sequence.block_table = found + tuple(self.pool.allocate(sequence.seq_id, need))
        sequence.num_named = len(found)
        sequence.num_cached = len(found) * self.pool.block_size
        if sequence.host_blocks:
            assert self._swap is not None
            self._swap.back(sequence, len(found))
        sequence.num_computed = max(sequence.num_computed, sequence.num_cached)
        self._running.add(sequence)
        if self._cache is not None:
            self._cache.admitted(sequence)

    def _chunk(self, sequence: Sequence, count: int) -> SequenceChunk:
        start = sequence.num_computed
        stop = start + count
        table = sequence.block_table
        needed = -(-stop // self.pool.block_size)
        asks = sequence.prompt_logprobs is not None and start + 1 < len(sequence.prompt_ids)
        self._batch.append(sequence)
        return SequenceChunk(
            sequence.seq_id,
            sequence.tokens(start, stop),
            start,
            table if len(table) == needed else table[:needed],
            stop == sequence.num_tokens,
            sequence.sampling,
            sequence.prompt_ids,
            sequence.output_ids,
            sequence.sampling.num_prompt_logprobs if asks else -1,
        )

    # --- growth and preemption ----------------------------------------------------------

    def _grow(self, sequence: Sequence) -> bool:
        """One more block for ``sequence``, at the cost of less urgent ones; False when it was
        the least urgent itself."""
        swap = self._swap
        while not self.pool.num_free and not (swap and swap.num_reusable):
            victim = self._running.least_urgent
            self._preempt(victim)
            if victim is sequence:
                return False
        if self.pool.num_free:
            blocks = self.pool.allocate(sequence.seq_id, 1)
        else:
            assert swap is not None
            blocks = swap.reuse(sequence.seq_id, 1)
        sequence.block_table += tuple(blocks)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self._num_preemptions += 1
        victim.num_preemptions += 1
        self._stop(victim)
        if self._swap is not None and self._swap.pays(victim):
            self._swap.out(victim)
        else:
            self._free(victim)
        self._waiting.push(victim)

    # --- results ------------------------------------------------------------------------

    def complete(self, result: StepResult) -> list[NewToken]:
        """Book the step in flight. Finished sequences are gone from here, their blocks free."""
        plan = self._in_flight
        assert plan is not None
        assert plan.step == result.step
        batch = self._end_step()
        if self._swap is not None:
            self._swap.completed(plan, result)
        for part in result.prompt_logprobs:
            found = self._sequences[part.seq_id].prompt_logprobs
            assert found is not None
            found[part.start - 1 :] = part.logprobs
        drawn = iter(result.sampled)
        news: list[NewToken] = []
        for chunk, sequence in zip(plan.chunks, batch, strict=True):
            token = next(drawn) if chunk.samples else None
            if sequence.is_dropped:
                self._remove(sequence)
                self._free(sequence)
                continue
            self._computed(sequence, chunk.start + len(chunk.token_ids))
            sequence.num_chunks += 1
            if token is not None:
                assert token.seq_id == chunk.seq_id, "samples come in the order of their chunks"
                news.append(self._append(sequence, token))
        return news

    def _end_step(self) -> list[Sequence]:
        batch, self._batch = self._batch, []
        self._in_flight, self._batch_ids = None, frozenset()
        return batch

    def _computed(self, sequence: Sequence, num_computed: int) -> None:
        sequence.num_computed = num_computed
        if self._cache is not None and num_computed // self.pool.block_size > sequence.num_named:
            self._wake(self._cache.computed(sequence))

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
        """The step in flight raised: drop its sequences and return those not dropped before.

        What is cached of them goes too: a prompt that fails because of the KV it shares would
        otherwise fail again and again.
        """
        assert self._in_flight is not None
        batch = self._end_step()
        if self._swap is not None:
            self._swap.abandoned()
        for sequence in batch:
            self.pool.forget(sequence.block_table)
            self._remove(sequence)
            self._free(sequence)
        return [sequence for sequence in batch if not sequence.is_dropped]

    def check_integrity(self) -> list[str]:
        problems = self.pool.check_integrity() + self._waiting.check_integrity()
        problems += self._running.check_integrity()
        running = {s.seq_id for s in self._running}
        for seq_id in running - set(self._sequences):
            problems.append(f"{seq_id} runs but is not registered")
        for seq_id in set(self._sequences) - running - self._waiting.ids():
            problems.append(f"{seq_id} neither waits nor runs")
        if self._cache is not None:
            problems += self._cache.check_integrity(running, self._waiting.parked_at())
        if self._swap is not None:
            problems += self._swap.check_integrity()
        return problems
