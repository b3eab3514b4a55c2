"""The scheduler with a fake engine that keeps KV: what it reads is what was computed for just
these tokens, by whomever, and only who holds a block alone writes to it."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Literal

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
from baton.engine.plan import SequenceChunk, StepPlan
from baton.engine.preemption import EngineRates
from baton.engine.scheduler import NewToken, Scheduler, Sequence
from baton.protocol.sampling import SamplingParams
from tests.support.core import EOS_ID, drawn_token, engine_config, run_plan

BLOCK_SIZE = 8
NUM_LAYERS = 5
Prefix = tuple[int, ...]
SIZES = st.integers(0, 79)
FEW = st.integers(0, 3)
PRIORITIES = st.integers(0, 2)


@dataclass
class Wanted:
    """A sequence as its owner sees it."""

    prompt: tuple[int, ...]
    output: list[int]
    max_tokens: int
    tenant: str


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(4, 9),
        budget=st.sampled_from([1, 3, 8, 16, 64]),
        max_num_seqs=st.integers(1, 5),
        watermark=st.sampled_from([0.0, 0.3]),
        prefix_cache=st.booleans(),
        swap_blocks=st.sampled_from([0, 0, 2, 12]),
        speculation=st.sampled_from(["off", "prompt_lookup"]),
        prefill_mode=st.sampled_from(["chunked", "layered"]),
    )
    def start(
        self,
        num_blocks: int,
        budget: int,
        max_num_seqs: int,
        watermark: float,
        prefix_cache: bool,
        swap_blocks: int,
        speculation: Literal["off", "prompt_lookup"],
        prefill_mode: Literal["chunked", "layered"] = "chunked",
    ) -> None:
        self.config = engine_config(
            num_blocks,
            block_size=BLOCK_SIZE,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            watermark=watermark,
            prefix_cache=prefix_cache,
            swap_blocks=swap_blocks,
            speculation=speculation,
            prefill_mode=prefill_mode,
        )
        self.pool = BlockPool(num_blocks, BLOCK_SIZE)
        self.scheduler = Scheduler(
            self.pool, self.config, frozenset([EOS_ID]), block_bytes=1, num_layers=NUM_LAYERS
        )
        self.scheduler.set_rates(EngineRates(1.0, 1e9, 1e9))
        self.alive: dict[str, Wanted] = {}
        self.finished: dict[str, Wanted] = {}
        self.heirs: dict[str, list[int]] = {}
        self.plan: StepPlan | None = None
        self.last_step = 0
        self.num_added = 0
        self.kv: dict[tuple[int, int], Prefix] = {}
        """(block, offset) to what the engine wrote there: KV of the last token of a prefix."""
        self.host: dict[tuple[int, int], Prefix] = {}
        self.half_way: dict[str, tuple[int, int, int]] = {}
        """Prompts on their way through the layers: (start, tokens, layers that are done)."""
        self.num_outside = 0
        self.outside: dict[str, list[int]] = {}

    @property
    def capacity(self) -> int:
        return self.config.num_blocks * BLOCK_SIZE

    def _want(self, size: int, num_output: int, growth: int, kind: int) -> tuple[str, Wanted]:
        """A request that fits into the whole pool; those of one kind begin alike."""
        num_prompt = 1 + size % (self.capacity // 2)
        max_tokens = num_output + 1 + growth % min(30, self.capacity - num_prompt - num_output)
        seq_id = f"r{self.num_added}/0"
        self.num_added += 1
        prompt = tuple((kind % 3 * 13 + i) % EOS_ID for i in range(num_prompt))
        output = [drawn_token(seq_id, num_prompt + i) for i in range(num_output)]
        return seq_id, Wanted(prompt, output, max_tokens, "other" if kind == 3 else "")

    def _sequence(self, seq_id: str, want: Wanted, priority: int) -> Sequence:
        sampling = SamplingParams(max_tokens=want.max_tokens, ignore_eos=True)
        return Sequence(
            seq_id, want.prompt, list(want.output), sampling, priority, tenant=want.tenant
        )

    @rule(size=SIZES, num_output=FEW, growth=SIZES, kind=FEW, priority=PRIORITIES, n=FEW)
    def add(
        self, size: int, num_output: int, growth: int, kind: int, priority: int, n: int
    ) -> None:
        """``n`` more of the same arrive with it."""
        for _ in range(1 + n):
            if len(self.alive) >= 8:
                return
            seq_id, want = self._want(size, num_output, growth, kind)
            self.scheduler.add(self._sequence(seq_id, want, priority))
            self.alive[seq_id] = want

    @rule(size=SIZES, growth=SIZES, kind=FEW, priority=PRIORITIES, spare=st.integers(0, 1))
    def add_computed(self, size: int, growth: int, kind: int, priority: int, spare: int) -> None:
        """A hand-over arrives: its blocks came filled, maybe with room to grow."""
        seq_id, want = self._want(size, 1, growth, kind)
        sequence = self._sequence(seq_id, want, priority)
        num_computed = sequence.num_tokens - 1
        need = min(self.pool.blocks_for(num_computed) + spare, self.config.num_blocks)
        if need > self.pool.num_free or len(self.alive) >= 8:
            return
        sequence.block_table = tuple(self.pool.allocate(seq_id, need))
        sequence.num_computed = num_computed
        self._write((*want.prompt, *want.output), 0, num_computed, sequence.block_table)
        self.scheduler.add_computed(sequence)
        self.alive[seq_id] = want

    @precondition(lambda self: self.alive)
    @rule(pick=SIZES)
    def drop(self, pick: int) -> None:
        seq_id = sorted(self.alive)[pick % len(self.alive)]
        assert self.scheduler.drop(seq_id)
        assert not self.scheduler.drop(seq_id)
        del self.alive[seq_id]

    @precondition(lambda self: self.plan is None)
    @rule()
    def schedule(self) -> None:
        plan = self.scheduler.schedule()
        assert self.scheduler.has_step_in_flight is (plan is not None)
        if plan is None:
            return
        self.plan = plan
        assert plan.step == self.last_step + 1
        self.last_step = plan.step
        self._check_budget(plan)
        assert plan.chunks or plan.swap_out
        self._check_swaps(plan)
        slots = self._copied(plan)
        ids = [chunk.seq_id for chunk in plan.chunks]
        assert len(set(ids)) == len(ids)
        for chunk in plan.chunks:
            want = self.alive[chunk.seq_id]
            known = (*want.prompt, *want.output)
            stop = chunk.start + len(chunk.token_ids)
            num_known = len(chunk.token_ids) - chunk.num_drafts
            assert chunk.token_ids[:num_known] == known[chunk.start : stop - chunk.num_drafts] != ()
            assert len(chunk.block_table) == self.pool.blocks_for(stop)
            is_whole = chunk.layer_start + chunk.num_layers in (0, NUM_LAYERS)
            assert chunk.samples is (is_whole and stop - chunk.num_drafts == len(known))
            self._check_layers(chunk)
            assert not chunk.num_drafts or num_known == 1
            assert len(want.output) + chunk.num_drafts < want.max_tokens
            for block in chunk.block_table:
                assert chunk.seq_id in self.pool.holders(block)
            for block in chunk.block_table[chunk.start // BLOCK_SIZE :]:
                assert self.pool.holders(block) == {chunk.seq_id}, "written while shared"
            for position in range(chunk.start):
                slot = (chunk.block_table[position // BLOCK_SIZE], position % BLOCK_SIZE)
                assert slots.get(slot) == known[: position + 1]

    def _check_budget(self, plan: StepPlan) -> None:
        """A step has the work of so many tokens through all layers; layers are not cut."""
        work = sum(len(c.token_ids) * (c.num_layers or NUM_LAYERS) for c in plan.chunks)
        in_groups = sum(len(c.token_ids) for c in plan.chunks if c.num_layers)
        budget = self.config.max_num_batched_tokens
        decodes = plan.num_tokens - in_groups
        assert work <= budget * NUM_LAYERS + in_groups + decodes * NUM_LAYERS * bool(in_groups)
        assert in_groups or plan.num_tokens <= budget
        assert in_groups <= budget * NUM_LAYERS

    def _check_layers(self, chunk: SequenceChunk) -> None:
        """The same tokens go through all layers, one group behind the other."""
        if chunk.num_layers == 0:
            assert chunk.seq_id not in self.half_way
            return
        assert self.config.prefill_mode == "layered"
        way = (chunk.start, len(chunk.token_ids), chunk.layer_start)
        if chunk.layer_start:
            assert self.half_way[chunk.seq_id] == way

    def _check_swaps(self, plan: StepPlan) -> None:
        """No block is copied twice, none that is copied out is free to others meanwhile."""
        taken = [s.block for s in plan.swap_in]
        assert len(set(taken)) == len(taken)
        host = [s.host_block for s in (*plan.swap_out, *plan.swap_in)]
        assert len(set(host)) == len(host)
        assert all(self.pool.num_holders(s.block) for s in plan.swap_out)

    def _copied(self, plan: StepPlan) -> dict[tuple[int, int], Prefix]:
        """What is where after the copies of the plan, before its chunks."""
        slots, host = dict(self.kv), dict(self.host)
        for swap in plan.swap_out:
            for offset in range(BLOCK_SIZE):
                host[swap.host_block, offset] = slots.get((swap.block, offset), ())
        for swap in plan.swap_in:
            for offset in range(BLOCK_SIZE):
                slots[swap.block, offset] = host.get((swap.host_block, offset), ())
        return slots

    def _write(self, known: Prefix, start: int, stop: int, table: tuple[int, ...]) -> None:
        for position in range(start, stop):
            slot = (table[position // BLOCK_SIZE], position % BLOCK_SIZE)
            self.kv[slot] = known[: position + 1]

    @precondition(lambda self: self.pool.num_free)
    @rule()
    def an_outsider_writes(self) -> None:
        """Transfers take blocks and fill them at any time, also while a step runs."""
        name = f"outside{self.num_outside}"
        self.num_outside += 1
        blocks = self.outside[name] = self.pool.allocate(name, 1)
        for offset in range(BLOCK_SIZE):
            self.kv[blocks[0], offset] = (-1,)

    @precondition(lambda self: self.outside)
    @rule()
    def an_outsider_goes(self) -> None:
        name = next(iter(self.outside))
        self.pool.release(name, self.outside.pop(name))

    @precondition(lambda self: self.plan is not None)
    @rule()
    def complete(self) -> None:
        plan, self.plan = self.plan, None
        assert plan is not None
        slots = self._copied(plan)
        for swap in plan.swap_out:
            for offset in range(BLOCK_SIZE):
                self.host[swap.host_block, offset] = self.kv.get((swap.block, offset), ())
        self.kv = slots
        self.half_way = {
            c.seq_id: (c.start, len(c.token_ids), c.layer_start + c.num_layers)
            for c in plan.chunks
            if 0 < c.layer_start + c.num_layers < NUM_LAYERS
        }
        for chunk in plan.chunks:
            if chunk.seq_id in self.half_way:
                continue
            drafts = chunk.token_ids[len(chunk.token_ids) - chunk.num_drafts :]
            known = chunk.prompt_ids + tuple(chunk.output_ids) + drafts
            stop = chunk.start + len(chunk.token_ids)
            self._write(known, chunk.start, stop, chunk.block_table)
        news = self.scheduler.complete(run_plan(plan))
        drawn = {c.seq_id for c in plan.chunks if c.samples and c.seq_id in self.alive}
        assert {new.sequence.seq_id for new in news} == drawn
        for new in news:
            self._take(new)

    def _take(self, new: NewToken) -> None:
        seq_id = new.sequence.seq_id
        want = self.alive[seq_id]
        position = len(want.prompt) + len(want.output)
        assert new.token_id == drawn_token(seq_id, position)
        want.output.append(new.token_id)
        assert new.place == len(want.output) - 1
        assert new.sequence.output_ids[: len(want.output)] == want.output
        assert new.finish_reason == ("length" if len(want.output) == want.max_tokens else "")
        if new.finish_reason:
            self.finished[seq_id] = self.alive.pop(seq_id)
            assert self.scheduler.get(seq_id) is None

    @rule(count=st.integers(1, 6))
    def run(self, count: int) -> None:
        for _ in range(count):
            if self.plan is None:
                self.schedule()
            if self.plan is not None:
                self.complete()
            self.adds_up()

    @precondition(lambda self: self.plan is None)
    @rule(count=st.integers(1, 20), goes_on_with_twin=st.booleans())
    def advance(self, count: int, goes_on_with_twin: bool) -> None:
        """Single steps and a twin that takes them at once end in the same state."""
        count = min(count, self.scheduler.steady_steps())
        if count == 0:
            return
        twin = copy.deepcopy(self.scheduler)
        tokens: dict[str, list[int]] = {seq_id: [] for seq_id in self.alive}
        for _ in range(count):
            self.schedule()
            assert self.plan is not None
            ids = [c.seq_id for c in self.plan.chunks]
            self.complete()
            for seq_id in ids:
                tokens[seq_id].append(self.alive[seq_id].output[-1])
        news = twin.advance(count, {i: drawn for i, drawn in tokens.items() if drawn})
        assert sorted((n.sequence.seq_id, n.place, n.token_id) for n in news) == sorted(
            (i, len(self.alive[i].output) - len(drawn) + n, token_id)
            for i, drawn in tokens.items()
            for n, token_id in enumerate(drawn)
        )
        assert state_of(twin) == state_of(self.scheduler)
        self.last_step = twin.num_steps
        if goes_on_with_twin:
            self.scheduler, self.pool = twin, twin.pool

    @precondition(lambda self: self.plan is not None)
    @rule()
    def abandon(self) -> None:
        plan, self.plan = self.plan, None
        assert plan is not None
        for swap in plan.swap_out:
            for offset in range(BLOCK_SIZE):
                self.host[swap.host_block, offset] = (-2,)
        for chunk in plan.chunks:
            for block in chunk.block_table[chunk.start // BLOCK_SIZE :]:
                for offset in range(BLOCK_SIZE):
                    self.kv[block, offset] = (-2,)
        self.half_way = {}
        failed = {s.seq_id for s in self.scheduler.abandon_step()}
        assert failed == {c.seq_id for c in plan.chunks if c.seq_id in self.alive}
        for seq_id in failed:
            del self.alive[seq_id]
            assert self.scheduler.get(seq_id) is None

    @precondition(lambda self: self.plan is None and self.alive)
    @rule(pick=SIZES)
    def take_blocks(self, pick: int) -> None:
        holders = [i for i in sorted(self.alive) if self.scheduler.get(i).block_table]
        if not holders:
            return
        seq_id = holders[pick % len(holders)]
        sequence = self.scheduler.get(seq_id)
        num_computed, table = sequence.num_computed, list(sequence.block_table)
        blocks = self.scheduler.take_blocks(sequence, f"{seq_id}#send")
        assert blocks == table
        assert sequence.num_computed == num_computed
        self.heirs[f"{seq_id}#send"] = blocks
        del self.alive[seq_id]

    @precondition(lambda self: self.heirs)
    @rule()
    def heir_is_done(self) -> None:
        heir = next(iter(self.heirs))
        self.pool.release(heir, self.heirs.pop(heir))

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        assert scheduler.check_integrity() == []
        in_flight = {c.seq_id for c in self.plan.chunks} if self.plan else set()
        may_hold = set(self.alive) | in_flight | set(self.heirs) | set(self.outside)
        assert {o for o in self.pool.owners if "#swap" not in o} <= may_hold
        if self.plan is None:
            assert not any("#swap" in o for o in self.pool.owners)
        for seq_id in self.alive:
            sequence = scheduler.get(seq_id)
            assert sequence is not None
            assert not sequence.is_dropped
            assert 0 <= sequence.num_computed < sequence.num_tokens
            kept = len(sequence.block_table) or len(sequence.host_blocks)
            assert kept * BLOCK_SIZE >= sequence.num_computed
        dropped = in_flight - set(self.alive)
        assert scheduler.num_running + scheduler.num_waiting == len(self.alive) + len(dropped)

    def teardown(self) -> None:
        """Everything still wanted finishes: nothing starves and nothing is lost."""
        if not hasattr(self, "scheduler"):
            return
        if self.plan is not None:
            self.complete()
        while self.heirs:
            self.heir_is_done()
        while self.outside:
            self.an_outsider_goes()
        left = sum(len(w.prompt) + w.max_tokens for w in self.alive.values())
        for _ in range(20 * left + 20):
            if not self.alive:
                break
            self.schedule()
            assert self.plan is not None, "sequences wait and nothing runs"
            self.complete()
        assert not self.alive, "sequences starve"
        for want in self.finished.values():
            assert len(want.output) == want.max_tokens
        assert self.pool.num_free == self.pool.num_blocks
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0)
        assert self.scheduler.schedule() is None
        assert self.scheduler.check_integrity() == []


def state_of(scheduler: Scheduler) -> object:
    """All that later steps depend on."""
    pool = scheduler.pool
    return (
        scheduler.num_steps,
        scheduler.counts,
        [
            (s.seq_id, s.output_ids, s.num_computed, s.num_chunks, s.num_named, s.block_table)
            for s in scheduler._running
        ],
        scheduler._waiting.ids(),
        scheduler._waiting.parked_at(),
        scheduler._here.gone,
        (pool._blank, [*pool._kept], pool._key_of, pool._holders),
    )


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=80, deadline=None)
def test_a_long_run_keeps_every_promise(seed: int) -> None:
    """Deeper than the rules above get: a small pool under load for hundreds of turns."""
    rng = random.Random(seed)
    machine = SchedulerMachine()
    machine.start(
        rng.randint(4, 12),
        rng.choice([1, 3, 8, 16, 64]),
        rng.randint(1, 6),
        rng.choice([0.0, 0.3]),
        rng.random() < 0.8,
        rng.choice([0, 4, 20]),
        rng.choice(["off", "prompt_lookup"]),
        rng.choice(["chunked", "layered"]),
    )
    for _ in range(150):
        kind = rng.random()
        few = rng.choices([0, 1, 2, 3], k=3)
        if kind < 0.2:
            machine.add(
                rng.randrange(80), few[0] // 2, rng.randrange(80), few[1], few[2] // 2, few[0]
            )
        elif kind < 0.25:
            machine.add_computed(rng.randrange(80), rng.randrange(80), few[0], few[1] // 2, 1)
        elif kind < 0.55 and machine.plan is None:
            machine.schedule()
        elif kind < 0.9 and machine.plan is not None:
            machine.complete()
        elif kind < 0.92 and machine.plan is not None:
            machine.abandon()
        elif kind < 0.93 and machine.plan is None:
            machine.advance(rng.randint(1, 20), rng.random() < 0.5)
        elif kind < 0.94 and machine.alive:
            machine.drop(rng.randrange(80))
        elif kind < 0.95 and machine.alive and machine.plan is None:
            machine.take_blocks(rng.randrange(80))
        elif kind < 0.98 and machine.pool.num_free:
            machine.an_outsider_writes()
        elif machine.outside:
            machine.an_outsider_goes()
        elif machine.heirs:
            machine.heir_is_done()
        machine.adds_up()
    machine.teardown()
