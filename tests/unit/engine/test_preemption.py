"""Which way back is predicted cheaper, and where the rates come from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.engine.block_pool import BlockPool
from baton.engine.plan import BlockSwap, SequenceChunk, StepPlan, StepResult
from baton.engine.preemption import (
    EngineRates,
    RateMeter,
    recompute_seconds,
    swap_is_cheaper,
    swap_seconds,
)
from baton.engine.scheduler import Scheduler, Sequence
from baton.protocol.sampling import SamplingParams
from tests.support.core import EOS_ID, engine_config, run_plan

RATES = EngineRates(
    prefill_seconds_per_token=1e-3,
    swap_out_bytes_per_second=1e9,
    swap_in_bytes_per_second=2e9,
)


def test_the_cost_of_both_ways() -> None:
    assert recompute_seconds(500, RATES) == pytest.approx(0.5)
    assert swap_seconds(10**9, RATES) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("num_tokens", "num_bytes", "swaps"),
    [(500, 10**8, True), (500, 10**9, False), (1, 10**8, False), (1_600, 10**9, True)],
)
def test_the_cheaper_way_is_taken(num_tokens: int, num_bytes: int, swaps: bool) -> None:
    assert swap_is_cheaper(num_tokens, num_bytes, RATES) is swaps


@pytest.mark.parametrize(
    "rates",
    [EngineRates(0.0, 1e9, 1e9), EngineRates(1e-3, 0.0, 1e9), EngineRates(1e-3, 1e9, 0.0)],
)
def test_what_was_never_measured_is_not_chosen(rates: EngineRates) -> None:
    assert not swap_is_cheaper(10**6, 1, rates)


def chunk(seq_id: str, num_tokens: int, num_layers: int = 0) -> SequenceChunk:
    return SequenceChunk(
        seq_id, (1,) * num_tokens, 0, (0,) * 99, False, SamplingParams(), num_layers=num_layers
    )


def test_steps_teach_the_rates() -> None:
    meter = RateMeter(EngineRates(), block_bytes=100)
    prompt = StepPlan(1, (chunk("a", 400), chunk("b", 1)))
    meter.observe(prompt, StepResult(1, (), 0.401))
    assert meter.rates == EngineRates(pytest.approx(1e-3))
    swaps = (BlockSwap(0, 0), BlockSwap(1, 1))
    moved = StepPlan(2, (chunk("b", 1),), swap_out=swaps, swap_in=swaps[:1])
    meter.observe(moved, StepResult(2, (), 9.0, swap_out_seconds=0.1, swap_in_seconds=0.2))
    assert meter.rates == EngineRates(pytest.approx(1e-3), 2_000.0, 500.0)
    meter.observe(prompt, StepResult(3, (), 0.802))
    assert 1e-3 < meter.rates.prefill_seconds_per_token < 2e-3


def test_decodes_and_bare_swaps_say_nothing_of_prefill() -> None:
    meter = RateMeter(RATES, block_bytes=100)
    meter.observe(StepPlan(1, (chunk("a", 1), chunk("b", 1))), StepResult(1, (), 5.0))
    meter.observe(StepPlan(2, (), swap_out=(BlockSwap(0, 0),)), StepResult(2, (), 0.0))
    assert meter.rates == RATES


def test_a_group_of_layers_counts_for_its_share_of_a_prefill() -> None:
    """However a prompt is cut, it costs the same: 80 tokens through 8 layers in 0.8 s."""
    cuts: tuple[tuple[int, ...], ...] = ((0,), (2, 2, 2, 2), (3, 5), (8,))
    for layers in cuts:
        meter = RateMeter(EngineRates(), block_bytes=100, num_layers=8)
        for step, num_layers in enumerate(layers):
            seconds = 0.8 * (num_layers or 8) / 8
            plan = StepPlan(step, (chunk("a", 80, num_layers),))
            meter.observe(plan, StepResult(step, (), seconds))
            assert meter.rates.prefill_seconds_per_token == pytest.approx(0.01), layers


def test_a_sliver_of_prefill_beside_decodes_says_nothing_of_it() -> None:
    """Eight decodes and 16 tokens through one layer of eight are ten tokens' work, not 24."""
    meter = RateMeter(RATES, block_bytes=100, num_layers=8)
    decodes = [chunk(str(n), 1) for n in range(8)]
    meter.observe(StepPlan(1, (*decodes, chunk("p", 16, 1))), StepResult(1, (), 9.0))
    assert meter.rates == RATES
    meter.observe(StepPlan(2, (*decodes, chunk("p", 160, 1))), StepResult(2, (), 9.0))
    assert meter.rates.prefill_seconds_per_token > RATES.prefill_seconds_per_token


def test_the_scheduler_measures_layered_prefill_as_what_it_is() -> None:
    config = engine_config(16, prefill_mode="layered", max_num_batched_tokens=20, swap_blocks=4)
    pool = BlockPool(config.num_blocks, config.block_size)
    scheduler = Scheduler(pool, config, frozenset([EOS_ID]), block_bytes=100, num_layers=4)
    scheduler.add(Sequence("s", tuple(range(80)), [], SamplingParams(max_tokens=2)))
    for _ in range(4):
        plan = scheduler.schedule()
        assert plan is not None
        assert [(len(c.token_ids), c.num_layers) for c in plan.chunks] == [(80, 1)]
        scheduler.complete(replace(run_plan(plan), compute_seconds=0.2))
    assert scheduler._swap is not None
    assert scheduler._swap.rates.prefill_seconds_per_token == pytest.approx(0.01)
