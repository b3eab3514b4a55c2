"""A hand-over that ends early: the decode worker computes the rest, and no token changes."""

from __future__ import annotations

import pytest

from baton.checkpoint.find import resolve
from baton.engine.block_pool import BlockPool
from baton.engine.executor import Executor
from baton.engine.scheduler import Scheduler, Sequence
from baton.protocol.config import EngineConfig
from baton.protocol.sampling import SamplingParams
from tests.support.prompts import prompt_of

NUM_TOKENS, NUM_DRAWN = 100, 12


def load() -> tuple[Executor, Scheduler]:
    executor = Executor.load(
        resolve("baton-tiny"),
        dtype="float32",
        device="cpu",
        num_blocks=32,
        block_size=16,
        num_threads=1,
    )
    config = EngineConfig(num_blocks=32, block_size=16, max_num_batched_tokens=48)
    return executor, Scheduler(BlockPool(32, 16), config, frozenset())


def run(executor: Executor, scheduler: Scheduler, sequence: Sequence, num_drawn: int) -> None:
    while len(sequence.output_ids) < num_drawn:
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.complete(executor.execute(plan))


@pytest.mark.parametrize("num_came", [0, 1, 31, 64, 99])
def test_tokens_are_those_of_a_whole_hand_over(num_came: int) -> None:
    prompt = tuple(prompt_of(NUM_TOKENS, 3))
    sampling = SamplingParams(max_tokens=NUM_DRAWN, temperature=0.8, seed=5, ignore_eos=True)
    source, prefill = load()
    whole = Sequence("whole", prompt, [], sampling)
    prefill.add(whole)
    run(source, prefill, whole, 1)
    table = whole.block_table
    num_layers = source.spec.num_layers
    kv = source.read_kv(table, 0, num_came, 0, num_layers) if num_came else b""
    run(source, prefill, whole, NUM_DRAWN)

    target, decode = load()
    blocks = tuple(decode.pool.allocate("short", 8))
    if num_came:
        target.write_kv(blocks, 0, num_came, 0, num_layers, kv)
    short = Sequence("short", prompt, whole.output_ids[:1], sampling)
    short.block_table, short.num_computed = blocks, num_came
    decode.add_computed(short)
    run(target, decode, short, NUM_DRAWN)
    assert short.output_ids == whole.output_ids
    assert decode.pool.num_free == 32
