"""Which tokens of which sequences the next step runs: continuous batching over KV blocks.

Pure: no torch, no clock. Prefill, decode and recompute after a preemption are one thing
here, as in vLLM's V1 scheduler: a sequence knows ``tokens`` and has KV for the first
``num_computed``; a step runs some of the rest, and draws a token when it runs all of it.

Sequences that run one token come first, so a prompt's chunks never stall a decode
(Sarathi-Serve, section 4); what is left of the token budget goes to prompts, to the last
token. When a running sequence cannot grow, the least urgent one is preempted: its blocks go,
and it waits to be recomputed or copied back.

Who waits, who runs, who is let in, what is shared, swapped, guessed or on its way through the
layers: each is a file of its own beside this one, which puts the steps together.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many

from baton.engine.admission import Admission
from baton.engine.block_pool import BlockPool
from baton.engine.host_swap import HostSwap
from baton.engine.layered import LayeredPrefill
from baton.engine.plan import SampledToken, SequenceChunk, StepPlan, StepResult
from baton.engine.preemption import EngineRates
from baton.engine.prefix_cache import PrefixCache
from baton.engine.residents import Residents
from baton.engine.sequence import FinishReason, NewToken, SchedulerCounts, Sequence, finish
from baton.engine.speculation import Speculator
from baton.engine.steady import decode_batch, steps_alike
from baton.protocol.config import EngineConfig

__all__ = ["FinishReason", "NewToken", "Scheduler", "SchedulerCounts", "Sequence"]


class Scheduler:
    """One step is in flight at a time: ``schedule``, run it, ``complete``, again.

    Blocks of a sequence dropped meanwhile stay its own until ``complete``: the engine may
    still be writing to them. block_bytes: of one KV block, all layers (for ``swap_blocks``).
    num_layers: of the model (for ``prefill_mode: layered`` and what a step of it costs).
    """

    def __init__(
        self,
        pool: BlockPool,
        config: EngineConfig,
        eos_token_ids: frozenset[int],
        *,
        block_bytes: int = 0,
        num_layers: int = 1,
    ) -> None:
        self.pool = pool
        self._config = config
        self._eos_token_ids = eos_token_ids
        self._cache = PrefixCache(pool) if config.prefix_cache else None
        self._swap: HostSwap | None = None
        if config.swap_blocks:
            self._swap = HostSwap(pool, config.swap_blocks, block_bytes, num_layers)
        self._here = Residents(pool, self._cache, self._swap, self._stopped)
        self._waiting, self._running = self._here.waiting, self._here.running
        self._speculator: Speculator | None = None
        if config.speculation == "prompt_lookup":
            self._speculator = Speculator(pool.block_size, eos_token_ids)
        self._layered = LayeredPrefill(num_layers) if config.prefill_mode == "layered" else None
        self._admission = Admission(
            config, pool, self._waiting, self._running, self._cache, self._swap
        )
        self._in_flight: StepPlan | None = None
        self._batch: list[Sequence] = []
        """The sequences of the step in flight, in the order of its chunks."""
        self._batch_ids: frozenset[str] = frozenset()
        self._num_steps = 0

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
            num_preemptions=self._here.num_preemptions,
            num_blocked=self._admission.num_blocked,
            num_swapped_out=swap.num_swapped_out if swap else 0,
            num_cache_queried_tokens=cache.num_queried_tokens if cache else 0,
            num_cache_hit_tokens=cache.num_hit_tokens if cache else 0,
            num_draft_tokens=self._speculator.num_drafted if self._speculator else 0,
            num_accepted_draft_tokens=self._speculator.num_accepted if self._speculator else 0,
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
        return self._here.sequences.get(seq_id)

    # --- coming and going ---------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose KV is to be computed here."""
        assert not sequence.block_table
        if sequence.sampling.num_prompt_logprobs >= 0 and not sequence.output_ids:
            sequence.prompt_logprobs = []
        self._here.register(sequence)
        self._waiting.push(sequence)

    def add_computed(self, sequence: Sequence) -> None:
        """Join a sequence whose blocks (owned under its seq_id) hold KV of ``num_computed``."""
        assert sequence.block_table
        assert sequence.num_computed == sequence.num_tokens - 1
        self._here.register(sequence)
        if self._cache is not None:
            self._cache.received(sequence)
        self._running.add(sequence)

    def drop(self, seq_id: str) -> bool:
        """Forget a sequence and free its blocks, at once or when its step completes."""
        sequence = self._here.sequences.get(seq_id)
        if sequence is None or sequence.is_dropped:
            return False
        if seq_id in self._ids_in_flight():
            sequence.is_dropped = True
        else:
            self._here.remove(sequence)
            self._here.free(sequence)
        return True

    def take_blocks(self, sequence: Sequence, heir: str) -> list[int]:
        """End a sequence here but keep its KV: the blocks go to ``heir``."""
        self._here.remove(sequence)
        blocks, sequence.block_table = list(sequence.block_table), ()
        self.pool.hand_over(sequence.seq_id, heir, blocks)
        return blocks

    def _stopped(self, sequence: Sequence) -> None:
        """It runs no more, for now or for good."""
        if self._speculator is not None:
            self._speculator.forget(sequence.seq_id)
        if self._layered is not None:
            self._layered.left(sequence)

    def _ids_in_flight(self) -> frozenset[str]:
        if self._in_flight is not None and not self._batch_ids:
            self._batch_ids = frozenset(s.seq_id for s in self._batch)
        return self._batch_ids

    # --- a step -------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can run now."""
        assert self._in_flight is None, "one step at a time"
        num_preempted = self._here.num_preemptions
        most = self._config.max_num_batched_tokens
        self._batch = []
        chunks, prompts = self._decodes(most)
        # What a preemption freed is for those that run.
        admits = self._here.num_preemptions == num_preempted
        if self._layered is None:
            chosen = self._prompts(prompts, most - len(chunks), admits)
            chunks += [self._chunk(sequence, count) for sequence, count in chosen]
        else:
            chunks += self._layer_group(self._layered, prompts, most - len(chunks), admits)
        if self._speculator is not None:
            self._speculator.extend(chunks, self._batch, most, self._spare_block)
        swap_out, swap_in = self._swap.planned() if self._swap else ((), ())
        if not chunks and not swap_out:
            return None
        self._num_steps += 1
        gone, self._here.gone = tuple(self._here.gone), []
        self._in_flight = StepPlan(self._num_steps, tuple(chunks), gone, swap_out, swap_in)
        return self._in_flight

    def _decodes(self, budget: int) -> tuple[list[SequenceChunk], list[Sequence]]:
        """A chunk for each sequence that runs one token; those that have more to run."""
        size, batch = self.pool.block_size, self._batch
        chunks: list[SequenceChunk] = []
        prompts: list[Sequence] = []
        for sequence in self._running.in_order():
            start, outputs = sequence.num_computed, sequence.output_ids
            if len(sequence.prompt_ids) + len(outputs) - start > 1:
                prompts.append(sequence)
                continue
            # One that was preempted a moment ago has no blocks.
            if len(chunks) == budget or not sequence.block_table:
                continue
            needed = start // size + 1
            if len(sequence.block_table) < needed and not self._here.grow(sequence):
                continue
            table = sequence.block_table
            batch.append(sequence)
            chunks.append(
                SequenceChunk(
                    sequence.seq_id,
                    (outputs[-1],) if outputs else sequence.prompt_ids[-1:],
                    start,
                    table if len(table) == needed else table[:needed],
                    True,
                    sequence.sampling,
                    sequence.prompt_ids,
                    outputs,
                )
            )
        return chunks, prompts

    def _prompts(
        self, prompts: list[Sequence], budget: int, admits: bool, single_cost: int = 1
    ) -> list[tuple[Sequence, int]]:
        """Who runs how many tokens of the rest of the budget: those that have begun, then new
        ones. single_cost: of running one token and no more."""
        chosen = []
        for sequence in prompts:
            count = min(sequence.num_tokens - sequence.num_computed, budget)
            cost = single_cost if count == 1 else count
            if sequence.block_table and 0 < cost <= budget:
                chosen.append((sequence, count))
                budget -= cost
        return chosen + self._admission.admit(budget, single_cost) if admits else chosen

    def _layer_group(
        self, layered: LayeredPrefill, prompts: list[Sequence], budget: int, admits: bool
    ) -> list[SequenceChunk]:
        """The next group of layers of the prompts on their way, or the first of a new batch."""
        alone = []
        if layered.is_under_way:
            chosen = [(s, layered.count(s)) for s in prompts if layered.count(s)]
        else:
            # One token is not worth spreading over steps: it takes all layers of this one.
            depth = layered.num_layers
            both = self._prompts(prompts, budget * depth, admits, single_cost=depth)
            alone = [self._chunk(s, n) for s, n in both if n == 1]
            chosen = [(s, n) for s, n in both if n > 1]
            layered.begin(chosen, budget - len(alone))
        return alone + [self._chunk(s, n, layered) for s, n in chosen]

    def _chunk(
        self, sequence: Sequence, count: int, layered: LayeredPrefill | None = None
    ) -> SequenceChunk:
        start = sequence.num_computed
        stop = start + count
        ends = layered is None or layered.is_last
        layer_start, num_layers = (0, 0) if layered is None else layered.layers
        asks = ends and sequence.prompt_logprobs is not None
        asks = asks and start + 1 < len(sequence.prompt_ids)
        self._batch.append(sequence)
        return SequenceChunk(
            seq_id=sequence.seq_id,
            token_ids=sequence.tokens(start, stop),
            start=start,
            block_table=sequence.block_table[: self.pool.blocks_for(stop)],
            samples=ends and stop == sequence.num_tokens,
            sampling=sequence.sampling,
            prompt_ids=sequence.prompt_ids,
            output_ids=sequence.output_ids,
            num_prompt_logprobs=sequence.sampling.num_prompt_logprobs if asks else -1,
            layer_start=layer_start,
            num_layers=num_layers,
        )

    def _spare_block(self, sequence: Sequence) -> bool:
        """One more block for its drafts, of those that nobody will need soon."""
        if self.pool.num_free <= max(self._admission.watermark_blocks, len(self._running)):
            return False
        sequence.block_table += tuple(self.pool.allocate(sequence.seq_id, 1))
        return True

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
            found = self._here.sequences[part.seq_id].prompt_logprobs
            assert found is not None
            found[part.start - 1 :] = part.logprobs
        drawn = {token.seq_id: token for token in reversed(result.sampled)}
        behind_drafts: dict[str, list[SampledToken]] = {}
        if len(drawn) < len(result.sampled):
            for token in result.sampled:
                behind_drafts.setdefault(token.seq_id, []).append(token)
        ends = self._layered is None or self._layered.is_last
        size = self.pool.block_size
        news: list[NewToken] = []
        for chunk, sequence in zip(plan.chunks, batch, strict=True):
            if sequence.is_dropped:
                self._here.remove(sequence)
                self._here.free(sequence)
                continue
            if chunk.num_layers and not ends:
                continue
            num_known = chunk.start + len(chunk.token_ids) - chunk.num_drafts
            sequence.num_computed = num_known
            sequence.num_chunks += 1
            if num_known // size > sequence.num_named:
                self._here.name_blocks(sequence, sequence.num_computed)
            if chunk.samples:
                first = drawn[chunk.seq_id]
                if chunk.num_drafts:
                    tokens = behind_drafts.get(chunk.seq_id, [first])
                    news += self._drawn(sequence, chunk, tokens)
                else:
                    news.append(self._append(sequence, first))
        if self._layered is not None:
            self._layered.step_done()
        return news

    def _drawn(
        self, sequence: Sequence, chunk: SequenceChunk, tokens: list[SampledToken]
    ) -> list[NewToken]:
        """Each token but the last was drafted, so its KV is there once it is output."""
        if self._speculator is not None:
            self._speculator.verified(chunk, len(tokens))
        news = [self._append(sequence, tokens[0])]
        for token in tokens[1:]:
            if news[-1].finish_reason:
                break
            sequence.num_computed += 1
            self._here.name_blocks(sequence, sequence.num_computed)
            news.append(self._append(sequence, token))
        return news

    def _end_step(self) -> list[Sequence]:
        batch, self._batch = self._batch, []
        self._in_flight, self._batch_ids = None, frozenset()
        return batch

    def _append(self, sequence: Sequence, drawn: SampledToken) -> NewToken:
        token_id = drawn.token_id
        sequence.output_ids.append(token_id)
        reason, stop_token_id = finish(sequence, token_id, self._eos_token_ids)
        if reason:
            self._here.remove(sequence)
            self._here.free(sequence)
        prompt_logprobs = tuple(sequence.prompt_logprobs or ())
        sequence.prompt_logprobs = None
        return NewToken(
            sequence,
            token_id,
            drawn.logprobs,
            reason,
            stop_token_id,
            prompt_logprobs,
            len(sequence.output_ids) - 1,
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
            self._here.remove(sequence)
            self._here.free(sequence)
        return [sequence for sequence in batch if not sequence.is_dropped]

    # --- many steps at once -------------------------------------------------------------

    def steady_steps(self) -> int:
        """After how many steps, each of the same decodes, something else may happen: a block
        is needed, a sequence ends by its length, a waiting one may be let in."""
        assert self._in_flight is None, "one step at a time"
        budget = self._config.max_num_batched_tokens
        batch = decode_batch(self._running, budget)
        is_let_in = self._admission.next_fits() if len(batch) < budget else None
        if is_let_in or self._speculator is not None:
            return 0
        watches = self._cache is not None and is_let_in is False
        return steps_alike(batch, self.pool.block_size, until_full_block=watches)

    def advance(self, num_steps: int, tokens: Mapping[str, Many[int]]) -> list[NewToken]:
        """As so many times ``schedule`` and ``complete``, at most ``steady_steps()`` of them.

        tokens: by sequence, what is drawn in each step; none of them may end it.
        """
        assert 0 < num_steps <= self.steady_steps()
        budget = self._config.max_num_batched_tokens
        batch = decode_batch(self._running, budget)
        if len(batch) < budget and self._admission.next_fits() is False:
            self._admission.num_blocked += num_steps
        size = self.pool.block_size
        full: list[tuple[int, int, int]] = []
        news: list[list[NewToken]] = [[] for _ in range(num_steps)]
        for place, sequence in enumerate(batch):
            start = sequence.num_computed
            for step, token_id in enumerate(tokens[sequence.seq_id][:num_steps]):
                new = self._append(sequence, SampledToken(sequence.seq_id, token_id))
                assert not new.finish_reason, f"token {token_id} ends {sequence.seq_id}"
                news[step].append(new)
            behind = sequence.num_computed = start + num_steps
            sequence.num_chunks += num_steps
            borders = range(start - start % size + size, behind + 1, size)
            full += [(border - start, place, border) for border in borders]
        # Of two blocks that hold the same, the one that was full first is found.
        for _, place, border in sorted(full):
            self._here.name_blocks(batch[place], border)
        self._num_steps += num_steps
        self._here.gone = []
        return [new for step in news for new in step]

    def check_integrity(self) -> list[str]:
        return self._here.check_integrity()
