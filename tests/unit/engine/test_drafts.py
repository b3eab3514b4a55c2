"""Drafts change when tokens come, never which: token for token, log-probability for
log-probability, whatever limits the draws."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.block_pool import BlockPool
from baton.engine.executor import Executor
from baton.engine.plan import SampledToken, SequenceChunk
from baton.engine.sampling.drafts import kept_draws, rows_of
from baton.engine.scheduler import NewToken, Scheduler, SchedulerCounts, Sequence
from baton.protocol.config import EngineConfig
from baton.protocol.constraint import Constraint
from baton.protocol.errors import InvalidRequest
from baton.protocol.sampling import SamplingParams
from tests.support.byte_tokenizer import EOS_ID, VOCAB_SIZE, text_of, write_byte_tokenizer
from tests.support.tiny_checkpoint import TINY_LLAMA, write_checkpoint

BLOCKS, BLOCK_SIZE = 48, 8
PROMPT = tuple(b"def f(a): return f(a - 1)\ndef f(a): return f(a - 1)\ndef f(")
LIST = Constraint("json_schema", json.dumps({"type": "array", "items": {"enum": [1, 22, None]}}))

CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy, min tokens": {"temperature": 0.0, "min_tokens": 30, "ignore_eos": False},
    "cool": {"temperature": 0.2, "top_k": 3, "num_logprobs": 2},
    "sampled": {"temperature": 1.0, "top_p": 0.3, "num_logprobs": 0},
    "hot": {"temperature": 3.0},
    "few ids": {"temperature": 0.7, "allowed_token_ids": (65, 66)},
    "bad words": {
        "temperature": 0.7,
        "allowed_token_ids": (65, 66),
        "bad_token_sequences": ((65, 65, 66), (66, 66)),
    },
    "bias": {"temperature": 1.0, "logit_bias": ((70, 9.0), (71, 8.0))},
    "stop": {
        "temperature": 0.7,
        "allowed_token_ids": (65, 66, 67),
        "logit_bias": ((67, -4.0),),
        "stop_token_ids": (67,),
    },
    "penalties": {"temperature": 0.7, "allowed_token_ids": (65, 66), "frequency_penalty": 0.5},
    "grammar": {"temperature": 1.0, "constraint": LIST, "ignore_eos": False},
    "grammar, greedy": {"temperature": 0.0, "constraint": LIST, "ignore_eos": False},
}


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> Executor:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, TINY_LLAMA | {"vocab_size": VOCAB_SIZE, "eos_token_id": EOS_ID})
    write_byte_tokenizer(folder)
    return Executor.load(
        folder,
        dtype="float32",
        device="cpu",
        num_blocks=BLOCKS,
        block_size=BLOCK_SIZE,
        num_threads=1,
        deterministic=True,
    )


def generate(
    executor: Executor,
    sampling: list[SamplingParams],
    speculation: Literal["off", "prompt_lookup"],
    num_blocks: int = BLOCKS,
) -> tuple[list[list[NewToken]], SchedulerCounts, int]:
    """All of a batch to its end: news per sequence, counts, steps."""
    config = EngineConfig(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=64,
        speculation=speculation,
    )
    pool = BlockPool(num_blocks, BLOCK_SIZE)
    scheduler = Scheduler(pool, config, frozenset([EOS_ID]))
    for number, params in enumerate(sampling):
        sequence = Sequence(f"{speculation}{number}", PROMPT[number:], [], params)
        if params.constraint is not None:
            sequence.grammar = executor.grammars.add(params.constraint)
        scheduler.add(sequence)
    news: list[list[NewToken]] = [[] for _ in sampling]
    while (plan := scheduler.schedule()) is not None:
        result = executor.execute(plan)
        assert result.failed == ()
        for new in scheduler.complete(result):
            news[int(new.sequence.seq_id.removeprefix(speculation))].append(new)
    assert scheduler.check_integrity() == []
    assert pool.num_free == num_blocks
    return news, scheduler.counts, scheduler.num_steps


def said(news: list[NewToken]) -> list[tuple[Any, ...]]:
    return [(n.place, n.token_id, n.logprobs, n.finish_reason, n.stop_token_id) for n in news]


def params(case: str, seed: int = 1, max_tokens: int = 60) -> SamplingParams:
    return SamplingParams(
        **({"max_tokens": max_tokens, "seed": seed, "ignore_eos": True} | CASES[case])
    )


@pytest.mark.parametrize("case", CASES)
def test_the_output_is_the_same_with_and_without(executor: Executor, case: str) -> None:
    plain, _, num_steps = generate(executor, [params(case)], "off")
    guessed, counts, fewer_steps = generate(executor, [params(case)], "prompt_lookup")
    assert said(guessed[0]) == said(plain[0])
    assert num_steps - fewer_steps == counts.num_accepted_draft_tokens
    if case == "penalties":
        assert counts.num_draft_tokens == 0
    elif case in ("greedy", "few ids", "stop"):
        assert counts.num_accepted_draft_tokens > 0
    if "grammar" in case and plain[0][-1].finish_reason == "stop":
        json.loads(text_of([n.token_id for n in plain[0]]))


@settings(max_examples=25, deadline=None)
@given(
    picks=st.lists(
        st.tuples(st.sampled_from(sorted(CASES)), st.integers(0, 99), st.integers(1, 40)),
        min_size=1,
        max_size=4,
    ),
    num_blocks=st.sampled_from([14, 24, BLOCKS]),
)
def test_batches_under_pressure_say_the_same(
    executor: Executor, picks: list[tuple[str, int, int]], num_blocks: int
) -> None:
    """Preemptions, ends in the middle of a draft and other sequences beside it."""
    sampling = [
        params("few ids" if "min" in case else case, seed, most) for case, seed, most in picks
    ]
    plain, _, _ = generate(executor, sampling, "off", num_blocks)
    guessed, _, _ = generate(executor, sampling, "prompt_lookup", num_blocks)
    assert [said(n) for n in guessed] == [said(n) for n in plain]


def chunk(*drafts: int) -> SequenceChunk:
    return SequenceChunk(
        "s", (5, *drafts), 10, (0, 1, 2), True, SamplingParams(), (), [4, 5], num_drafts=len(drafts)
    )


def test_rows_stand_at_their_positions_behind_their_drafts() -> None:
    rows = rows_of(chunk(6, 7))
    assert [(r.position, tuple(r.output_ids), r.num_drafts) for r in rows] == [
        (11, (4, 5), 0),
        (12, (4, 5, 6), 1),
        (13, (4, 5, 6, 7), 2),
    ]


@pytest.mark.parametrize(
    ("drawn", "kept"),
    [((6, 7, 8), [6, 7, 8]), ((6, 9, 8), [6, 9]), ((9, 7, 8), [9])],
)
def test_draws_hold_up_to_the_first_wrong_draft(drawn: tuple[int, ...], kept: list[int]) -> None:
    tokens = [SampledToken("s", i) for i in drawn]
    held, failed = kept_draws([chunk(6, 7)], tokens, {})
    assert ([t.token_id for t in held], failed) == (kept, ())


def test_an_error_counts_where_it_is_reached() -> None:
    tokens = [SampledToken("s", i) for i in (6, 9, 8)]
    assert kept_draws([chunk(6, 7)], tokens, {2: InvalidRequest("no")})[1] == ()
    [failed] = kept_draws([chunk(6, 7)], tokens, {1: InvalidRequest("no")})[1]
    assert (failed.seq_id, failed.code, failed.message) == ("s", "invalid_request", "no")
