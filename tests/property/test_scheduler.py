"""The scheduler with a fake engine that keeps KV: what it reads was written, by its owner."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from baton.engine.block_pool import BlockPool
from baton.engine.plan import StepPlan
from baton.engine.scheduler import NewToken, Scheduler, Sequence
from baton.protocol.sampling import SamplingParams
from tests.support.core import EOS_ID, drawn_token, engine_config, run_plan

BLOCK_SIZE = 8


@dataclass
class Wanted:
    """A sequence as its owner sees it."""

    prompt: tuple[int, ...]
    output: list[int]
    max_tokens: int


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(4, 9),
        budget=st.sampled_from([1, 3, 8, 16, 64]),
        max_num_seqs=st.integers(1, 5),
        watermark=st.sampled_from([0.0, 0.3]),
    )
    def start(self, num_blocks: int, budget: int, max_num_seqs: int, watermark: float) -> None:
        self.config = engine_config(
            num_blocks,
            block_size=BLOCK_SIZE,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            watermark=watermark,
        )
        self.pool = BlockPool(num_blocks, BLOCK_SIZE)
        self.scheduler = Scheduler(self.pool, self.config, frozenset([EOS_ID]))
        self.alive: dict[str, Wanted] = {}
        self.finished: dict[str, Wanted] = {}
        self.heirs: dict[str, list[int]] = {}
        self.plan: StepPlan | None = None
        self.last_step = 0
        self.num_added = 0
        self.kv: dict[tuple[int, int], tuple[str, int, int]] = {}
        """(block, offset) to what the engine wrote there: sequence, position, token."""

    @property
    def capacity(self) -> int:
        return self.config.num_blocks * BLOCK_SIZE

    def _want(self, data: st.DataObject) -> tuple[str, Wanted]:
        num_prompt = data.draw(st.integers(1, self.capacity // 2), "prompt")
        num_output = data.draw(st.integers(0, 3), "output so far")
        most = min(30, self.capacity + 1 - num_prompt)
        max_tokens = data.draw(st.integers(num_output + 1, max(num_output + 1, most)), "max_tokens")
        if num_prompt + max_tokens - 1 > self.capacity:
            num_prompt = self.capacity + 1 - max_tokens
        seq_id = f"r{self.num_added}/0"
        self.num_added += 1
        prompt = tuple((self.num_added * 13 + i) % EOS_ID for i in range(num_prompt))
        output = [drawn_token(seq_id, num_prompt + i) for i in range(num_output)]
        return seq_id, Wanted(prompt, output, max_tokens)

    def _sequence(self, seq_id: str, want: Wanted, priority: int) -> Sequence:
        sampling = SamplingParams(max_tokens=want.max_tokens, ignore_eos=True)
        return Sequence(seq_id, want.prompt, list(want.output), sampling, priority)

    @precondition(lambda self: len(self.alive) < 8)
    @rule(data=st.data(), priority=st.integers(0, 2))
    def add(self, data: st.DataObject, priority: int) -> None:
        seq_id, want = self._want(data)
        self.scheduler.add(self._sequence(seq_id, want, priority))
        self.alive[seq_id] = want

    @precondition(lambda self: len(self.alive) < 8)
    @rule(data=st.data(), priority=st.integers(0, 2), spare=st.integers(0, 1))
    def add_computed(self, data: st.DataObject, priority: int, spare: int) -> None:
        """A hand-over arrives: its blocks came filled, maybe with room to grow."""
        seq_id, want = self._want(data)
        if not want.output:
            return
        sequence = self._sequence(seq_id, want, priority)
        num_computed = sequence.num_tokens - 1
        need = min(self.pool.blocks_for(num_computed) + spare, self.config.num_blocks)
        if need > self.pool.num_free:
            return
        sequence.block_table = self.pool.allocate(seq_id, need)
        sequence.num_computed = num_computed
        self._write(seq_id, 0, sequence.tokens(0, num_computed), tuple(sequence.block_table))
        self.scheduler.add_computed(sequence)
        self.alive[seq_id] = want

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.alive)))
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
        assert 0 < plan.num_tokens <= self.config.max_num_batched_tokens
        ids = [chunk.seq_id for chunk in plan.chunks]
        assert len(set(ids)) == len(ids)
        tables = [b for chunk in plan.chunks for b in chunk.block_table]
        assert len(set(tables)) == len(tables), "two sequences share a block"
        for chunk in plan.chunks:
            want = self.alive[chunk.seq_id]
            known = (*want.prompt, *want.output)
            stop = chunk.start + len(chunk.token_ids)
            assert chunk.token_ids == known[chunk.start : stop] != ()
            assert len(chunk.block_table) == self.pool.blocks_for(stop)
            assert chunk.samples is (stop == len(known))
            for position in range(chunk.start):
                slot = (chunk.block_table[position // BLOCK_SIZE], position % BLOCK_SIZE)
                assert self.kv.get(slot) == (chunk.seq_id, position, known[position])

    def _write(
        self, seq_id: str, start: int, token_ids: tuple[int, ...], table: tuple[int, ...]
    ) -> None:
        for position, token_id in enumerate(token_ids, start):
            slot = (table[position // BLOCK_SIZE], position % BLOCK_SIZE)
            self.kv[slot] = (seq_id, position, token_id)

    @precondition(lambda self: self.plan is not None)
    @rule()
    def complete(self) -> None:
        plan, self.plan = self.plan, None
        assert plan is not None
        for chunk in plan.chunks:
            self._write(chunk.seq_id, chunk.start, chunk.token_ids, chunk.block_table)
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
        assert new.sequence.output_ids == want.output
        assert new.finish_reason == ("length" if len(want.output) == want.max_tokens else "")
        if new.finish_reason:
            self.finished[seq_id] = self.alive.pop(seq_id)
            assert self.scheduler.get(seq_id) is None

    @precondition(lambda self: self.plan is not None)
    @rule()
    def abandon(self) -> None:
        plan, self.plan = self.plan, None
        assert plan is not None
        failed = {s.seq_id for s in self.scheduler.abandon_step()}
        assert failed == {c.seq_id for c in plan.chunks if c.seq_id in self.alive}
        for seq_id in failed:
            del self.alive[seq_id]
            assert self.scheduler.get(seq_id) is None

    @precondition(lambda self: self.plan is None and self.alive)
    @rule(data=st.data())
    def take_blocks(self, data: st.DataObject) -> None:
        holders = [i for i in sorted(self.alive) if self.scheduler.get(i).block_table]
        if not holders:
            return
        seq_id = data.draw(st.sampled_from(holders))
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
        may_hold = set(self.alive) | in_flight | set(self.heirs)
        assert self.pool.owners <= may_hold
        for seq_id in self.alive:
            sequence = scheduler.get(seq_id)
            assert sequence is not None
            assert not sequence.is_dropped
            assert 0 <= sequence.num_computed < sequence.num_tokens
            assert len(sequence.block_table) * BLOCK_SIZE >= sequence.num_computed
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


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
