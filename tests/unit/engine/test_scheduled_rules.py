"""Penalties, masks and prompt log-probabilities whatever the schedule, and after a new start.

In deterministic mode, so that no near tie excuses a difference.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from baton.engine.block_pool import BlockPool
from baton.engine.executor import Executor
from baton.engine.preemption import EngineRates
from baton.engine.scheduler import Scheduler, Sequence
from baton.protocol.sampling import SamplingParams, TokenLogprobs
from tests.support.core import engine_config
from tests.support.tiny_checkpoint import TINY_LLAMA, write_checkpoint

NUM_LAYERS = 2
NUM_TOKENS = 30
LENGTHS = (40, 2, 97, 1, 40, 33)
EOS = 1

Answers = dict[str, tuple[list[int], tuple[TokenLogprobs, ...]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TINY_LLAMA | {"num_hidden_layers": NUM_LAYERS}
    return write_checkpoint(tmp_path_factory.mktemp("model"), config)


def params(number: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=NUM_TOKENS,
        temperature=1.3,
        top_p=0.98,
        min_p=0.001,
        seed=number,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.4,
        logit_bias=((7, 2.0), (9, -4.0)),
        bad_token_ids=(11,),
        bad_token_sequences=((7, 7), (12, 13)),
        min_tokens=20,
        stop_token_ids=(14, 15),
        num_prompt_logprobs=number % 3,
        num_logprobs=1,
    )


def run(folder: Path, known: dict[str, list[int]] | None = None, **changes: Any) -> Answers:
    """``known``: outputs that requests bring along, as after a lost worker."""
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
    scheduler = Scheduler(
        BlockPool(config.num_blocks, config.block_size),
        config,
        frozenset({EOS}),
        block_bytes=executor.block_bytes,
        num_layers=NUM_LAYERS,
    )
    scheduler.set_rates(EngineRates(1.0, 1e9, 1e9))
    waiting = [
        Sequence(
            f"r{number}/0",
            tuple((length * 7 + i * 5) % 61 for i in range(length)),
            list((known or {}).get(f"r{number}/0", ())),
            params(number),
        )
        for number, length in enumerate(LENGTHS)
    ]
    answers: Answers = {s.seq_id: (s.output_ids, ()) for s in waiting}
    while waiting or scheduler.num_running or scheduler.num_waiting:
        if waiting:
            scheduler.add(waiting.pop(0))
        plan = scheduler.schedule()
        assert plan is not None
        for new in scheduler.complete(executor.execute(plan)):
            if new.prompt_logprobs:
                answers[new.sequence.seq_id] = (new.sequence.output_ids, new.prompt_logprobs)
    if changes.get("num_blocks"):
        assert scheduler.counts.num_preemptions > 0
    return answers


@pytest.fixture(scope="module")
def expected(folder: Path) -> Answers:
    answers = run(folder, max_num_batched_tokens=512)
    for (output, logprobs), length in zip(answers.values(), LENGTHS, strict=True):
        assert 20 <= len(output) <= NUM_TOKENS
        assert 11 not in output
        assert (7, 7) not in set(itertools.pairwise(output))
        assert not set(output[:19]) & {EOS, 14, 15}
        assert len(logprobs) == length - 1
    return answers


@pytest.mark.parametrize(
    "changes",
    [
        {"max_num_batched_tokens": 16},
        {"prefill_mode": "layered", "max_num_batched_tokens": 24},
        {"num_blocks": 18},
        {"num_blocks": 18, "swap_blocks": 64},
        {"prefix_cache": False},
    ],
    ids=str,
)
def test_any_schedule_gives_the_same(
    folder: Path, expected: Answers, changes: dict[str, Any]
) -> None:
    assert run(folder, **changes) == expected


@pytest.mark.parametrize("cut", [1, 7, 19])
def test_a_new_start_goes_on_with_the_same_tokens(
    folder: Path, expected: Answers, cut: int
) -> None:
    known = {seq_id: output[:cut] for seq_id, (output, _) in expected.items()}
    again = run(folder, known)
    assert {i: output for i, (output, _) in again.items()} == {
        i: output for i, (output, _) in expected.items()
    }
    assert not any(logprobs for _, logprobs in again.values()), "the first attempt told them"
