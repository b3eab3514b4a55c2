"""Which blocks of a victim on its way to host memory others may have at once."""

from __future__ import annotations

from baton.engine.block_pool import BlockPool
from baton.engine.host_swap import HostSwap
from baton.engine.preemption import EngineRates
from baton.engine.scheduler import Scheduler, Sequence
from baton.protocol.block_hash import EXACT, block_key, root_key
from baton.protocol.sampling import SamplingParams
from tests.support.core import EOS_ID, engine_config, run_plan


def test_only_blocks_that_the_victim_had_to_itself_are_reused() -> None:
    pool = BlockPool(8, block_size=4)
    swap = HostSwap(pool, 8, block_bytes=1)
    shared, own = pool.allocate("victim", 2), pool.allocate("victim", 1)
    key = root_key("", EXACT)
    for block in shared:
        key = block_key(key, (block,))
        pool.publish(block, key)
    pool.share("reader", shared)
    victim = Sequence("victim", tuple(range(11)), [], SamplingParams())
    victim.block_table, victim.num_computed, victim.num_named = (*shared, *own), 10, 2

    swap.out(victim)
    assert swap.num_reusable == 1
    assert swap.reuse("heir", 1) == own
    assert pool.find(key) == shared[-1], "it is still found"
    assert pool.holders(shared[0]) == {"reader", "victim#swap"}
    swap.abandoned()
    assert pool.holders(shared[0]) == {"reader"}


def test_nobody_is_given_a_block_that_another_reads() -> None:
    """a and b share a prompt; b goes. c cannot grow into what b gave up, for a is reading it."""
    config = engine_config(11, block_size=16, max_num_batched_tokens=512, swap_blocks=16)
    scheduler = Scheduler(BlockPool(11, 16), config, frozenset([EOS_ID]), block_bytes=1)
    scheduler.set_rates(EngineRates(1.0, 1e9, 1e9))
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    for name, first in (("a", 0), ("c", 500), ("b", 0)):
        scheduler.add(Sequence(name, tuple(range(first, first + 70)), [], sampling))
    while True:
        plan = scheduler.schedule()
        assert plan is not None
        if plan.swap_out:
            break
        scheduler.complete(run_plan(plan))
    assert scheduler.counts.num_preemptions == 2
    assert [c.seq_id for c in plan.chunks] == ["a"], "c had to go too"
    [reader] = plan.chunks
    assert len(set(reader.block_table)) == 6
    assert all("a" in scheduler.pool.holders(b) for b in reader.block_table)
    scheduler.complete(run_plan(plan))
    assert scheduler.check_integrity() == []
