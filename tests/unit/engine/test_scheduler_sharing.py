"""Who shares blocks with whom: siblings, later requests, other tenants, the recomputed."""

from __future__ import annotations

from typing import Any

import pytest

from baton.engine.block_pool import BlockPool
from baton.engine.plan import StepPlan, StepResult
from baton.engine.preemption import EngineRates
from baton.engine.scheduler import NewToken, Scheduler, Sequence
from baton.protocol.sampling import SamplingParams
from tests.support.core import EOS_ID, engine_config, run_plan

PROMPT = tuple(range(100))


class Engine:
    def __init__(self, num_blocks: int = 64, **config: Any) -> None:
        settings = {"block_size": 16, "max_num_batched_tokens": 512} | config
        self.config = engine_config(num_blocks, **settings)
        self.pool = BlockPool(num_blocks, self.config.block_size)
        self.scheduler = Scheduler(self.pool, self.config, frozenset([EOS_ID]), block_bytes=1)

    def add(self, name: str, prompt: tuple[int, ...] = PROMPT, **fields: Any) -> Sequence:
        sampling = SamplingParams(max_tokens=fields.pop("max_tokens", 8), ignore_eos=True)
        output = list(fields.pop("output", ()))
        sequence = Sequence(name, prompt, output, sampling, **fields)
        self.scheduler.add(sequence)
        return sequence

    def plan(self) -> StepPlan:
        plan = self.scheduler.schedule()
        assert plan is not None
        return plan

    def done(self, plan: StepPlan) -> list[NewToken]:
        news = self.scheduler.complete(run_plan(plan))
        assert self.scheduler.check_integrity() == []
        return news

    def step(self) -> StepPlan:
        plan = self.plan()
        self.done(plan)
        return plan

    def finish(self) -> None:
        while self.scheduler.num_running or self.scheduler.num_waiting:
            self.step()


def shape(plan: StepPlan) -> list[tuple[str, int, int]]:
    """(sequence, first position, tokens) of each chunk."""
    return [(c.seq_id, c.start, len(c.token_ids)) for c in plan.chunks]


def test_four_choices_of_one_prompt_hold_its_blocks_once() -> None:
    engine = Engine()
    choices = [engine.add(f"r.{n}/0") for n in range(4)]
    assert shape(engine.step()) == [("r.0/0", 0, 100)], "the others wait for the blocks"
    plan = engine.plan()
    assert shape(plan) == [
        ("r.0/0", 100, 1),
        ("r.1/0", 96, 4),
        ("r.2/0", 96, 4),
        ("r.3/0", 96, 4),
    ]
    tables = [c.block_table for c in plan.chunks]
    assert len({table[:6] for table in tables}) == 1
    assert len({block for table in tables for block in table}) == 6 + 4
    assert engine.pool.num_blocks - engine.pool.num_free == 6 + 4
    assert engine.pool.holders(tables[0][0]) == {c.seq_id for c in choices}
    engine.done(plan)
    counts = engine.scheduler.counts
    assert (counts.num_cache_queried_tokens, counts.num_cache_hit_tokens) == (400, 3 * 96)
    engine.finish()
    assert engine.pool.owners == frozenset()
    assert engine.pool.num_free == engine.pool.num_blocks


def test_whoever_waits_for_blocks_lets_others_pass_and_follows_at_once() -> None:
    engine = Engine(max_num_batched_tokens=64)
    engine.add("first/0")
    engine.add("sibling/0")
    engine.add("other/0", tuple(range(200, 230)))
    assert shape(engine.step()) == [("first/0", 0, 64)]
    assert shape(engine.step()) == [("first/0", 64, 36), ("other/0", 0, 28)]
    assert shape(engine.step()) == [("first/0", 100, 1), ("other/0", 28, 2), ("sibling/0", 96, 4)]


def test_a_more_urgent_sibling_waits_for_nobody() -> None:
    engine = Engine(max_num_batched_tokens=64)
    engine.add("first/0", priority=1)
    engine.step()
    engine.add("urgent/0", priority=0)
    assert shape(engine.step()) == [("first/0", 64, 36), ("urgent/0", 64, 28)]


def test_the_sibling_of_one_that_is_dropped_computes_itself() -> None:
    engine = Engine(max_num_batched_tokens=32)
    engine.add("first/0")
    engine.add("sibling/0")
    engine.step()
    engine.step()
    assert engine.scheduler.drop("first/0")
    assert shape(engine.step()) == [("sibling/0", 64, 32)]
    engine.finish()


def test_a_finished_prompt_stays_until_its_blocks_are_needed() -> None:
    engine = Engine(num_blocks=10)
    engine.add("r/0", max_tokens=1)
    engine.finish()
    engine.add("again/0", max_tokens=1)
    assert shape(engine.step()) == [("again/0", 96, 4)]
    engine.add("big/0", tuple(range(500, 660)), max_tokens=1)
    engine.finish()
    engine.add("later/0", max_tokens=1)
    assert shape(engine.step()) == [("later/0", 0, 100)]


def test_a_hit_leaves_one_token_to_compute() -> None:
    engine = Engine()
    engine.add("r/0", PROMPT[:64], max_tokens=1)
    engine.finish()
    engine.add("again/0", PROMPT[:64], max_tokens=1)
    assert shape(engine.step()) == [("again/0", 48, 16)]
    engine.add("longer/0", PROMPT[:65], max_tokens=1)
    assert shape(engine.step()) == [("longer/0", 64, 1)]


def test_tenants_share_nothing() -> None:
    engine = Engine()
    engine.add("r/0", tenant="a", max_tokens=1)
    engine.finish()
    engine.add("b/0", tenant="b", max_tokens=1)
    assert shape(engine.step()) == [("b/0", 0, 100)]
    engine.add("a/0", tenant="a", max_tokens=1)
    assert shape(engine.step()) == [("a/0", 96, 4)]


def test_without_the_cache_everybody_computes() -> None:
    engine = Engine(prefix_cache=False)
    engine.add("r.0/0", max_tokens=1)
    engine.add("r.1/0", max_tokens=1)
    assert shape(engine.step()) == [("r.0/0", 0, 100), ("r.1/0", 0, 100)]
    assert engine.scheduler.counts.num_cache_queried_tokens == 0


def test_recomputing_finds_its_own_blocks() -> None:
    """Two grow in a pool too small for both; the victim's blocks are lost from the end."""
    engine = Engine(num_blocks=9, block_size=16, watermark=0.0)
    engine.add("a/0", tuple(range(64)), max_tokens=60)
    engine.add("b/0", tuple(range(300, 364)), max_tokens=60)
    while not engine.scheduler.counts.num_preemptions:
        engine.step()
    victim = engine.scheduler.get("b/0")
    assert victim is not None
    assert victim.num_preemptions == 1
    before = engine.scheduler.counts.num_cache_hit_tokens
    engine.finish()
    assert engine.scheduler.counts.num_cache_hit_tokens > before


def test_a_step_that_raised_leaves_nothing_to_find() -> None:
    engine = Engine(max_num_batched_tokens=64)
    engine.add("r/0")
    engine.step()
    engine.plan()
    assert [s.seq_id for s in engine.scheduler.abandon_step()] == ["r/0"]
    engine.add("again/0")
    assert shape(engine.step()) == [("again/0", 0, 64)]


def test_received_blocks_are_shared_and_doubles_go_back() -> None:
    engine = Engine()
    for name in ("a/0", "b/0"):
        sequence = Sequence(name, PROMPT, [1], SamplingParams(max_tokens=8))
        sequence.block_table = tuple(engine.pool.allocate(name, 7))
        sequence.num_computed = 100
        engine.scheduler.add_computed(sequence)
    assert engine.pool.num_blocks - engine.pool.num_free == 6 + 2
    plan = engine.plan()
    first, second = (c.block_table for c in plan.chunks)
    assert first[:6] == second[:6]
    assert first[6] != second[6]


def test_prompt_log_probabilities_need_every_row() -> None:
    engine = Engine()
    engine.add("r/0", max_tokens=1)
    engine.finish()
    sampling = SamplingParams(max_tokens=1, num_prompt_logprobs=0)
    engine.scheduler.add(Sequence("asks/0", PROMPT, [], sampling))
    assert shape(engine.step()) == [("asks/0", 0, 100)]


def swapping_engine() -> Engine:
    engine = Engine(num_blocks=9, swap_blocks=8)
    engine.scheduler.set_rates(EngineRates(1.0, 1e9, 1e9))
    engine.add("a/0", tuple(range(64)), max_tokens=60)
    engine.add("b/0", tuple(range(300, 364)), max_tokens=60)
    while not engine.scheduler.counts.num_preemptions:
        plan = engine.plan()
        if engine.scheduler.counts.num_preemptions:
            assert len(plan.swap_out) == 4
            assert not plan.swap_in
        engine.done(plan)
    return engine


def test_a_victim_whose_copy_is_cheaper_comes_back_where_it_was() -> None:
    engine = swapping_engine()
    victim = engine.scheduler.get("b/0")
    assert victim is not None
    num_computed = victim.num_computed
    assert num_computed == 64
    assert len(victim.host_blocks) == 4
    plans = []
    while not plans or not plans[-1].swap_in:
        plans.append(engine.step())
    back = next(c for c in plans[-1].chunks if c.seq_id == "b/0")
    assert (back.start, len(back.token_ids)) == (num_computed, 1)
    assert victim.host_blocks == ()
    engine.finish()
    assert engine.scheduler.counts.num_swapped_out == 1


def test_a_victim_of_a_step_that_raised_is_recomputed() -> None:
    engine = Engine(num_blocks=9, swap_blocks=8, prefix_cache=False)
    engine.scheduler.set_rates(EngineRates(1.0, 1e9, 1e9))
    engine.add("a/0", tuple(range(64)), max_tokens=60)
    engine.add("b/0", tuple(range(300, 364)), max_tokens=60)
    while True:
        plan = engine.plan()
        if plan.swap_out:
            break
        engine.done(plan)
    assert [s.seq_id for s in engine.scheduler.abandon_step()] == ["a/0"]
    assert engine.scheduler.check_integrity() == []
    assert shape(engine.step())[0][:2] == ("b/0", 0)


def test_the_only_one_that_runs_is_copied_out_alone() -> None:
    """Transfers hold the rest of the pool: a plan of copies and nothing else."""
    engine = Engine(num_blocks=4, swap_blocks=8)
    engine.scheduler.set_rates(EngineRates(1.0, 1e9, 1e9))
    engine.add("a/0", PROMPT[:30], max_tokens=8)
    engine.pool.allocate("transfer", 2)
    while True:
        plan = engine.plan()
        if not plan.chunks:
            break
        engine.done(plan)
    assert len(plan.swap_out) == 2
    engine.scheduler.complete(StepResult(plan.step, (), 0.0, swap_out_seconds=0.1))
    assert engine.scheduler.schedule() is None
    engine.pool.release("transfer", [b for b in range(4) if "transfer" in engine.pool.holders(b)])
    assert len(engine.step().swap_in) == 0, "its blocks were still there"
    engine.finish()


def test_decodes_come_before_prompts_whatever_their_urgency() -> None:
    engine = Engine(max_num_batched_tokens=32)
    engine.add("decodes/0", PROMPT[:20], priority=2)
    engine.step()
    engine.add("prompt/0", tuple(range(500, 600)), priority=0)
    for _ in range(3):
        plan = engine.step()
        assert shape(plan)[0][0] == "decodes/0"
        assert plan.num_tokens == 32


def arrives(engine: Engine, name: str, complete_from: int, max_tokens: int = 60) -> Sequence:
    """64 tokens whose rows before ``complete_from`` did not come for all layers."""
    prompt = tuple(range(64))
    sequence = Sequence(name, prompt, [7], SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    sequence.block_table = tuple(engine.pool.allocate(name, 5))
    sequence.num_computed, sequence.complete_from = 64, complete_from
    engine.scheduler.add_computed(sequence)
    return sequence


def found(engine: Engine, sequence: Sequence) -> list[int]:
    """Numbers of its leading four blocks that others can find."""
    keys = sequence.keys(4, 16)
    return [n for n in range(4) if engine.pool.find(keys[n]) is not None]


@pytest.mark.parametrize(
    ("complete_from", "blocks"), [(0, [0, 1, 2, 3]), (16, [1, 2, 3]), (17, [2, 3]), (64, [])]
)
def test_blocks_that_lack_rows_are_nobody_elses(complete_from: int, blocks: list[int]) -> None:
    engine = Engine()
    sequence = arrives(engine, "a/0", complete_from)
    assert found(engine, sequence) == blocks
    engine.step()
    assert found(engine, sequence) == blocks
    engine.add("alike/0", tuple(range(64)), max_tokens=1)
    assert shape(engine.step())[1] == (
        "alike/0",
        0 if complete_from else 48,
        64 if complete_from else 16,
    )
    assert found(engine, sequence) == [0, 1, 2, 3], "the other one has computed them"


def test_blocks_that_lack_rows_are_swapped_for_complete_ones() -> None:
    engine = Engine()
    engine.add("alike/0", tuple(range(64)))
    engine.step()
    sequence = arrives(engine, "a/0", 64)
    keys = sequence.keys(4, 16)
    assert sequence.block_table[:4] == tuple(engine.pool.find(key) for key in keys[:4])


def preempted(engine: Engine) -> Sequence:
    engine.add("urgent/0", tuple(range(300, 364)), max_tokens=60)
    victim = arrives(engine, "a/0", 33)
    while not victim.num_preemptions:
        engine.step()
    return victim


def test_a_victim_that_is_recomputed_lacks_nothing() -> None:
    engine = Engine(num_blocks=9)
    victim = preempted(engine)
    assert (victim.num_computed, victim.complete_from) == (0, 0)
    assert found(engine, victim) == [3], "free, and kept"
    while not victim.num_computed:
        engine.step()
    assert found(engine, victim) == [0, 1, 2, 3]


def test_a_victim_that_was_copied_out_lacks_what_it_lacked() -> None:
    engine = Engine(num_blocks=9, swap_blocks=8)
    engine.scheduler.set_rates(EngineRates(1.0, 1e9, 1e9))
    victim = preempted(engine)
    assert (len(victim.host_blocks), victim.complete_from) == (5, 33)
    while not victim.block_table:
        engine.step()
    engine.step()
    assert found(engine, victim) == [3]


def test_a_victim_whose_copy_is_doubtful_lacks_nothing() -> None:
    engine = Engine(num_blocks=9, swap_blocks=8)
    engine.scheduler.set_rates(EngineRates(1.0, 1e9, 1e9))
    engine.add("urgent/0", tuple(range(300, 364)), max_tokens=60)
    victim = arrives(engine, "a/0", 33)
    plan = engine.plan()
    while not plan.swap_out:
        engine.done(plan)
        plan = engine.plan()
    engine.scheduler.abandon_step()
    assert (victim.num_computed, victim.complete_from) == (0, 0)
