"""Scheduler and executor together: whatever the schedule, the tokens are the same.

In deterministic mode, so that no near tie excuses a difference.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from baton.engine.block_pool import BlockPool
from baton.engine.executor import Executor
from baton.engine.plan import BlockSwap, SequenceChunk, StepPlan
from baton.engine.preemption import EngineRates
from baton.engine.scheduler import Scheduler, Sequence
from baton.protocol.errors import InternalError
from baton.protocol.sampling import SamplingParams
from tests.support.core import engine_config
from tests.support.tiny_checkpoint import TINY_LLAMA, write_checkpoint

NUM_LAYERS = 5
LENGTHS = (40, 3, 97, 1, 40, 64, 17, 40)
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TINY_LLAMA | {"num_hidden_layers": NUM_LAYERS}
    return write_checkpoint(tmp_path_factory.mktemp("model"), config)


def run(folder: Path, **changes: Any) -> tuple[dict[str, list[int]], Scheduler, list[StepPlan]]:
    """Requests arrive one a step; three of them begin alike. What each got, and how."""
    settings: dict[str, Any] = {"num_blocks": 64, "max_num_batched_tokens": 16} | changes
    config = engine_config(**settings)
    executor = Executor.load(
        folder,
        dtype="float32",
        device="cpu",
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        num_threads=1,
        swap_blocks=config.swap_blocks,
        deterministic=True,
    )
    pool = BlockPool(config.num_blocks, config.block_size)
    scheduler = Scheduler(
        pool, config, frozenset(), block_bytes=executor.block_bytes, num_layers=NUM_LAYERS
    )
    scheduler.set_rates(EngineRates(1.0, 1e9, 1e9))
    waiting = [
        Sequence(
            f"r{number}/0",
            tuple((length * 7 + i * 5) % 61 for i in range(length)),
            [],
            SamplingParams(max_tokens=NUM_TOKENS, temperature=0.8, seed=number, ignore_eos=True),
        )
        for number, length in enumerate(LENGTHS)
    ]
    outputs = {s.seq_id: s.output_ids for s in waiting}
    plans: list[StepPlan] = []
    while waiting or scheduler.num_running or scheduler.num_waiting:
        if waiting:
            scheduler.add(waiting.pop(0))
        plan = scheduler.schedule()
        assert plan is not None
        plans.append(plan)
        scheduler.complete(executor.execute(plan))
        assert scheduler.check_integrity() == []
    assert pool.num_free == pool.num_blocks
    assert {len(tokens) for tokens in outputs.values()} == {NUM_TOKENS}
    return outputs, scheduler, plans


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[int]]:
    """Whole prompts, without a cache."""
    outputs, _, _ = run(folder, max_num_batched_tokens=512, prefix_cache=False)
    return outputs


def test_chunks_and_cached_prefixes_change_nothing(
    folder: Path, expected: dict[str, list[int]]
) -> None:
    outputs, scheduler, _ = run(folder)
    assert scheduler.counts.num_cache_hit_tokens >= 2 * 32
    assert outputs == expected


@pytest.mark.parametrize("budget", [4, 16])
def test_layered_prefill_gives_what_chunked_gives(
    folder: Path, expected: dict[str, list[int]], budget: int
) -> None:
    outputs, _, plans = run(folder, prefill_mode="layered", max_num_batched_tokens=budget)
    assert outputs == expected
    groups = {(c.layer_start, c.num_layers) for p in plans for c in p.chunks if c.num_layers}
    assert len(groups) > 2
    # A decode runs in every step that a prompt is on its way through.
    for before, plan in itertools.pairwise(plans):
        if any(c.layer_start for c in plan.chunks):
            drew = {c.seq_id for c in before.chunks if c.samples and not c.num_layers}
            assert drew <= {c.seq_id for c in plan.chunks if not c.num_layers} | {
                c.seq_id for c in before.chunks if len(c.output_ids) == NUM_TOKENS
            }


@pytest.mark.parametrize("mode", ["chunked", "layered"])
@pytest.mark.parametrize("swap_blocks", [0, 30])
def test_preemption_changes_nothing(
    folder: Path, expected: dict[str, list[int]], swap_blocks: int, mode: str
) -> None:
    outputs, scheduler, plans = run(
        folder, num_blocks=20, swap_blocks=swap_blocks, prefill_mode=mode
    )
    assert scheduler.counts.num_preemptions > 0
    assert (scheduler.counts.num_swapped_out > 0) is (swap_blocks > 0)
    assert any(p.swap_in for p in plans) is (swap_blocks > 0)
    assert outputs == expected


def test_a_plan_that_goes_on_with_nothing_is_refused(folder: Path) -> None:
    executor = Executor.load(
        folder, dtype="float32", device="cpu", num_blocks=8, block_size=8, num_threads=1
    )
    sampling = SamplingParams()
    late = SequenceChunk("s", (1, 2), 0, (0,), True, sampling, layer_start=3, num_layers=2)
    with pytest.raises(InternalError, match="not here"):
        executor.execute(StepPlan(1, (late,)))
    apart = SequenceChunk("t", (1, 2), 0, (1,), False, sampling, layer_start=0, num_layers=2)
    with pytest.raises(InternalError, match="stand apart"):
        executor.execute(StepPlan(1, (late, apart)))
    with pytest.raises(InternalError, match="no swap_blocks"):
        executor.execute(StepPlan(1, (), swap_out=(BlockSwap(0, 0),)))
