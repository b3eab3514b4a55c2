"""KV that came through a lossy codec serves nobody who asked for better."""

from __future__ import annotations

import pytest

from baton.engine.scheduler import Sequence
from baton.protocol.block_hash import KV_FLOORS, classes_for
from baton.protocol.sampling import SamplingParams
from tests.unit.engine.test_scheduler_sharing import PROMPT, Engine

WAYS = ("exact", "high", "medium", "low")


def arrive(engine: Engine, name: str, quality: str, prompt: tuple[int, ...] = PROMPT) -> Sequence:
    """KV of all of ``prompt`` came from elsewhere, as good as that."""
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    sequence = Sequence(name, prompt, [7], sampling, accepts=classes_for(quality), quality=quality)
    count = engine.pool.blocks_for(len(prompt) + 2)
    sequence.block_table = tuple(engine.pool.allocate(name, count))
    sequence.num_computed = len(prompt)
    engine.scheduler.add_computed(sequence)
    return sequence


def hits(engine: Engine, name: str, floor: str, prompt: tuple[int, ...] = PROMPT) -> Sequence:
    """A request with that floor, once it has run."""
    sequence = engine.add(name, prompt, max_tokens=1, accepts=classes_for(floor))
    engine.finish()
    return sequence


@pytest.mark.parametrize("floor", KV_FLOORS)
@pytest.mark.parametrize("came", WAYS)
def test_cached_kv_serves_floors_up_to_its_own_quality(came: str, floor: str) -> None:
    engine = Engine()
    arrive(engine, "first", came)
    engine.finish()
    is_good_enough = came == "exact" or KV_FLOORS.index(came) <= KV_FLOORS.index(floor)
    assert hits(engine, "second", floor).num_cached == (96 if is_good_enough else 0)


def test_what_looks_back_at_lossy_kv_is_no_better_than_that() -> None:
    engine = Engine()
    arrive(engine, "first", "medium")
    engine.finish()
    longer = PROMPT[:96] + tuple(range(500, 564))
    assert hits(engine, "second", "low", longer).num_cached == 96
    assert hits(engine, "exact", "lossless", longer).num_cached == 0
    assert hits(engine, "high", "high", longer).num_cached == 144, "the exact request's own"
    assert hits(engine, "medium", "medium", (*longer, 1)).num_cached == 160


def test_what_is_computed_for_a_low_floor_is_exact_where_nothing_lossy_is_below_it() -> None:
    engine = Engine()
    hits(engine, "first", "low")
    assert hits(engine, "second", "exact").num_cached == 96


def test_the_longest_is_taken_and_of_equals_the_best() -> None:
    engine = Engine()
    arrive(engine, "low", "low")
    arrive(engine, "exact", "exact", PROMPT[:50])
    engine.finish()
    assert hits(engine, "lossless", "lossless", PROMPT[:70]).num_cached == 48
    engine = Engine()
    arrive(engine, "low", "low")
    arrive(engine, "exact", "exact")
    engine.finish()
    equal = hits(engine, "any", "low")
    assert (equal.num_cached, equal.quality) == (96, "exact")


def test_a_lossy_sequence_that_lost_its_kv_and_computes_it_again_is_exact() -> None:
    engine = Engine(num_blocks=14, max_num_seqs=2)
    arrive(engine, "victim", "low")
    victim = engine.scheduler._here.sequences["victim"]
    engine.scheduler._here._preempt(victim)
    assert victim.quality == "exact"
    engine.pool.forget(range(14))
    engine.finish()
    assert hits(engine, "after", "exact").num_cached == 96
