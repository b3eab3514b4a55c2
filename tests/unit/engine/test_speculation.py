"""How long drafts are, who gets them and what they may take."""

from __future__ import annotations

from baton.engine.block_pool import BlockPool
from baton.engine.plan import SampledToken, SequenceChunk, StepResult
from baton.engine.scheduler import Scheduler, Sequence
from baton.engine.speculation import MAX_DRAFT_TOKENS, draft_length
from baton.protocol.sampling import SamplingParams
from tests.support.core import EOS_ID, engine_config

PATTERN = (11, 12, 13, 14)


def test_length_falls_with_load_and_grows_with_acceptance() -> None:
    lengths = {n: [draft_length(n, a / 20) for a in range(21)] for n in (1, 8, 32, 128, 129)}
    for of_load in lengths.values():
        assert of_load == sorted(of_load)
    for quiet, busy in ((1, 8), (8, 32), (32, 128), (128, 129)):
        assert all(a >= b for a, b in zip(lengths[quiet], lengths[busy], strict=True))
    assert lengths[1][19] == MAX_DRAFT_TOKENS
    assert lengths[1][0] == 0
    assert lengths[32][4] == 0 < lengths[1][4]
    assert set(lengths[129]) == {0}


def scheduler(**engine: int) -> Scheduler:
    config = engine_config(**({"num_blocks": 16} | engine), speculation="prompt_lookup")  # type: ignore[arg-type]
    return Scheduler(BlockPool(config.num_blocks, config.block_size), config, frozenset([EOS_ID]))


def repeating(
    name: str = "s", *, prompt: tuple[int, ...] = PATTERN * 2, **sampling: object
) -> Sequence:
    params = SamplingParams(**({"max_tokens": 50, "ignore_eos": True} | sampling))  # type: ignore[arg-type]
    return Sequence(name, prompt, [], params)


def step(s: Scheduler, *token_ids: int) -> SequenceChunk:
    """Run one; ``token_ids`` are drawn for its only sequence."""
    plan = s.schedule()
    assert plan is not None
    [chunk] = plan.chunks
    drawn = tuple(SampledToken(chunk.seq_id, i) for i in token_ids)
    s.complete(StepResult(plan.step, drawn, 0.0))
    return chunk


def test_a_pattern_is_guessed_and_what_was_right_is_kept() -> None:
    s = scheduler()
    sequence = repeating()
    s.add(sequence)
    assert step(s, 11).num_drafts == 0, "a prompt is not a decode"
    chunk = step(s, 12, 13, 14, 99)
    assert chunk.token_ids[: chunk.num_drafts + 1] == (11, 12, 13, 14, 11)[: chunk.num_drafts + 1]
    assert chunk.num_drafts >= 3
    assert sequence.output_ids == [11, 12, 13, 14, 99]
    assert sequence.num_computed == sequence.num_tokens - 1
    counts = s.counts
    assert (counts.num_draft_tokens, counts.num_accepted_draft_tokens) == (chunk.num_drafts, 3)
    after = step(s, 5)
    assert (after.token_ids, after.start) == ((99,), 12), "overwrites what was wrong"


def test_an_end_inside_a_draft_ends_the_sequence_there() -> None:
    s = scheduler()
    s.add(repeating(max_tokens=50, stop_token_ids=(13,)))
    step(s, 11)
    chunk = step(s, 12, 13)
    assert chunk.token_ids == (11, 12), "nothing is guessed from a stop token on"
    assert (s.num_running, s.pool.num_free) == (0, s.pool.num_blocks)

    s.add(repeating("t", max_tokens=3))
    step(s, 11)
    assert step(s, 12, 13).num_drafts == 1, "one is drawn in any case"
    assert (s.num_running, s.pool.num_free) == (0, s.pool.num_blocks)


def test_tokens_behind_an_end_are_dropped() -> None:
    """The engine does not know of ends: it may keep draws behind one."""
    s = scheduler()
    sequence = repeating(ignore_eos=False, prompt=(1, 2, 3, 4, 1, 2, 3))
    s.add(sequence)
    step(s, 4)
    plan = s.schedule()
    assert plan is not None
    drawn = tuple(SampledToken("s", i) for i in (1, EOS_ID, 3))
    news = s.complete(StepResult(plan.step, drawn, 0.0))
    assert [(n.token_id, n.finish_reason, n.place) for n in news] == [
        (1, "", 1),
        (EOS_ID, "stop", 2),
    ]
    assert s.check_integrity() == []


def test_penalties_are_not_drafted() -> None:
    s = scheduler()
    s.add(repeating(presence_penalty=0.5))
    step(s, 11)
    assert step(s, 12).num_drafts == 0


def test_drafts_take_no_block_that_others_will_need() -> None:
    """Of 3 blocks of 8 one is free: it stays so, and drafts end with their sequence's blocks."""
    s = scheduler(num_blocks=3)
    s.add(repeating(prompt=(*PATTERN, *PATTERN, 11, 12, 13)))
    step(s, 14)
    chunk = step(s, 11)
    assert chunk.start + len(chunk.token_ids) <= 16
    assert chunk.num_drafts > 0
    assert s.pool.num_free == 1


def test_drafts_keep_to_the_token_budget() -> None:
    s = scheduler(max_num_batched_tokens=8)
    s.add(repeating())
    step(s, 11)
    s.add(Sequence("long", tuple(range(100, 130)), [], SamplingParams(max_tokens=2)))
    plan = s.schedule()
    assert plan is not None
    assert [(c.seq_id, c.num_drafts, len(c.token_ids)) for c in plan.chunks] == [
        ("s", 0, 1),
        ("long", 0, 7),
    ], "prompts first"


def test_bad_guesses_stop_and_are_tried_again() -> None:
    s = scheduler(num_blocks=64)
    s.add(repeating(max_tokens=400))
    step(s, 11)
    lengths = []
    for number in range(300):
        # Always the pattern's next but for what the draft said: every guess is wrong.
        plan = s.schedule()
        assert plan is not None
        [chunk] = plan.chunks
        lengths.append(chunk.num_drafts)
        wrong = (*PATTERN, *PATTERN)[number % 4] if chunk.num_drafts == 0 else 500 + number
        s.complete(StepResult(plan.step, (SampledToken("s", wrong),), 0.0))
    assert sum(lengths) < 150
    assert s.counts.num_accepted_draft_tokens == 0


def test_what_is_kept_of_a_sequence_goes_with_it() -> None:
    s = scheduler()
    s.add(repeating())
    step(s, 11)
    step(s, 12)
    assert s._speculator is not None
    assert s._speculator.num_kept == 1
    s.drop("s")
    assert s._speculator.num_kept == 0
