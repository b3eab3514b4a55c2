"""The engine's steps: continuous batching over KV blocks.

Pure: no torch, no clock. Prefill, decode and recompute after a preemption are one thing
here, as in vLLM's V1 scheduler: a sequence knows ``tokens`` and has KV for the first
``num_computed``; a step runs some of the rest, and draws a token when it runs all of it. When a
running sequence cannot grow, the least urgent one is preempted: its blocks go, and it waits to
be recomputed or copied back.

This file owns the step in flight and how sequences come and go. Which tokens a step has
(``packing``), what its result changes (``booking``), who waits, who runs, who is let in, what is
shared, swapped, guessed or on its way through the layers: each is a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many

from baton.engine.admission import Admission
from baton.engine.block_pool import BlockPool
from baton.engine.booking import Booking
from baton.engine.host_swap import HostSwap
from baton.engine.layered import LayeredPrefill
from baton.engine.packing import Packing
from baton.engine.plan import StepPlan, StepResult
from baton.engine.preemption import EngineRates
from baton.engine.prefix_cache import PrefixCache
from baton.engine.residents import Residents
from baton.engine.sequence import FinishReason, NewToken, SchedulerCounts, Sequence
from baton.engine.speculation import Speculator
from baton.engine.steady import Steady
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
        budget = config.max_num_batched_tokens
        self._packing = Packing(
            budget, self._here, self._admission, self._layered, self._speculator
        )
        self._booking = Booking(self._here, self._layered, self._speculator, eos_token_ids)
        self._steady = Steady(budget, self._here, self._admission, self._booking)
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
        """Join a sequence whose blocks (owned under its seq_id) hold KV of ``num_computed``.

        Where that is not all but one, the blocks have room for all, and the rest is computed
        here, in chunks.
        """
        left = sequence.num_tokens - sequence.num_computed
        num_blocks = self.pool.blocks_for(sequence.num_tokens)
        assert left > 0
        assert left == 1 or len(sequence.block_table) >= num_blocks
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
        chunks, self._batch = self._packing.pack()
        swap_out, swap_in = self._swap.planned() if self._swap else ((), ())
        if not chunks and not swap_out:
            return None
        self._num_steps += 1
        gone, self._here.gone = tuple(self._here.gone), []
        self._in_flight = StepPlan(self._num_steps, tuple(chunks), gone, swap_out, swap_in)
        return self._in_flight

    # --- results ------------------------------------------------------------------------

    def complete(self, result: StepResult) -> list[NewToken]:
        """Book the step in flight. Finished sequences are gone from here, their blocks free."""
        plan = self._in_flight
        assert plan is not None
        assert plan.step == result.step
        batch = self._end_step()
        if self._swap is not None:
            self._swap.completed(plan, result)
        return self._booking.book(plan, batch, result)

    def _end_step(self) -> list[Sequence]:
        batch, self._batch = self._batch, []
        self._in_flight, self._batch_ids = None, frozenset()
        return batch

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
        return 0 if self._speculator is not None else self._steady.num_steps()

    def advance(self, num_steps: int, tokens: Mapping[str, Many[int]]) -> list[NewToken]:
        """As so many times ``schedule`` and ``complete``, at most ``steady_steps()`` of them.

        tokens: by sequence, what is drawn in each step; none of them may end it.
        """
        assert 0 < num_steps <= self.steady_steps()
        news = self._steady.advance(num_steps, tokens)
        self._num_steps += num_steps
        return news

    def check_integrity(self) -> list[str]:
        return self._here.check_integrity()
