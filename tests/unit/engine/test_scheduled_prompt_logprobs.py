"""The scheduler's part: who asks computes every prompt token here, once each, in order."""

from __future__ import annotations

import pytest

from baton.engine.block_pool import BlockPool
from baton.engine.plan import PromptLogprobs, StepPlan, StepResult
from baton.engine.sampling.prompt_logprobs import num_scored
from baton.engine.scheduler import NewToken, Scheduler, Sequence
from baton.protocol.sampling import SamplingParams, TokenLogprobs
from tests.support.core import EOS_ID, engine_config, run_plan

ASKS = SamplingParams(max_tokens=40, ignore_eos=True, num_prompt_logprobs=0)
QUIET = SamplingParams(max_tokens=40, ignore_eos=True)


def scheduler(num_blocks: int = 16) -> Scheduler:
    config = engine_config(num_blocks)
    return Scheduler(BlockPool(num_blocks, config.block_size), config, frozenset({EOS_ID}))


def scored(plan: StepPlan) -> StepResult:
    """The fake engine; a token's log-probability is minus its position."""
    parts = tuple(
        PromptLogprobs(
            c.seq_id,
            c.start + 1,
            tuple(TokenLogprobs(-float(c.start + 1 + i)) for i in range(num_scored(c))),
        )
        for c in plan.chunks
        if num_scored(c)
    )
    result = run_plan(plan)
    return StepResult(result.step, result.sampled, result.compute_seconds, parts)


def run(one: Scheduler, num_steps: int) -> dict[str, list[NewToken]]:
    news: dict[str, list[NewToken]] = {}
    for _ in range(num_steps):
        plan = one.schedule()
        if plan is None:
            break
        for new in one.complete(scored(plan)):
            news.setdefault(new.sequence.seq_id, []).append(new)
    return news


@pytest.mark.parametrize("length", [1, 2, 8, 16, 17, 50])
def test_the_first_token_brings_them_all(length: int) -> None:
    one = scheduler()
    one.add(Sequence("a", tuple(range(length)), [], ASKS))
    one.add(Sequence("b", tuple(range(100, 120)), [], QUIET))
    first, *others = run(one, 9)["a"]
    assert [p.logprob for p in first.prompt_logprobs] == [-float(i) for i in range(1, length)]
    assert not any(new.prompt_logprobs for new in others)


def test_a_cached_prefix_is_not_used_by_who_asks() -> None:
    one = scheduler()
    for name, sampling in (("warm", QUIET), ("asks", ASKS), ("quiet", QUIET)):
        one.add(Sequence(name, tuple(range(40)), [], sampling))
        first = run(one, 4)[name][0]
        assert len(first.prompt_logprobs) == (39 if name == "asks" else 0)
        one.drop(name)
    assert first.sequence.num_cached == 32, "the one behind it hits again"


def test_a_preemption_on_the_way_starts_over() -> None:
    """Two urgent sequences grow until the third must give its half-computed prompt back."""
    one = scheduler(num_blocks=12)
    for name in ("a", "b"):
        one.add(Sequence(name, (1,) * 8, [], SamplingParams(max_tokens=25, ignore_eos=True)))
    run(one, 7)
    slow = Sequence("slow", tuple(range(50, 114)), [], ASKS, priority=1)
    one.add(slow)
    news = run(one, 60)
    assert slow.num_preemptions > 0
    assert [p.logprob for p in news["slow"][0].prompt_logprobs] == [-float(i) for i in range(1, 64)]


def test_a_continuation_does_not_ask_again() -> None:
    one = scheduler()
    one.add(Sequence("a", tuple(range(20)), [7], ASKS))
    plan = one.schedule()
    assert plan is not None
    assert [num_scored(c) for c in plan.chunks] == [0]


def test_a_plan_names_once_who_has_gone() -> None:
    one = scheduler()
    for name in ("ends", "dropped", "stays"):
        max_tokens = 1 if name == "ends" else 40
        one.add(Sequence(name, (1, 2, 3), [], SamplingParams(max_tokens=max_tokens)))
    gone: list[tuple[str, ...]] = []
    for step in range(4):
        plan = one.schedule()
        assert plan is not None
        gone.append(plan.gone)
        one.complete(scored(plan))
        if step == 1:
            one.drop("dropped")
    assert gone == [(), ("ends",), ("dropped",), ()]
