"""No number without the tokens of transformers: our engine, theirs, and scripted ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import gate as module
from benchmarks.engine.answer import Engine, Setup, measured
from benchmarks.engine.gate import TOLERANCES, GateRed, check
from benchmarks.engine.run_baton import Baton
from benchmarks.engine.run_transformers import Transformers
from tests.support.tiny_checkpoint import TINY_LLAMA, tiny_weights, write_checkpoint

OUTPUT_TOKENS = 6
NEAR_TIE = TOLERANCES["float32"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OUTPUT_TOKENS", OUTPUT_TOKENS)
    monkeypatch.setattr(module, "PROMPT_TOKENS", (3, 40))
    monkeypatch.setattr("benchmarks.engine.cases.VOCAB_SIZE", TINY_LLAMA["vocab_size"])


class Scripted:
    """Answers what it was given."""

    def __init__(self, name: str, **answers: Any) -> None:
        self.name = name
        self._answers = answers

    async def ask(self, question: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        return dict(self._answers)


class InProcess:
    def __init__(self, name: str, engine: Engine) -> None:
        self.name = name
        self._engine = engine

    async def ask(self, question: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        return measured(self._engine, dict(question))


def red(gap: float) -> list[list[float]]:
    return [[0.0] * OUTPUT_TOKENS, [0.0, 0.0, gap, 0.0, 0.0, 0.0]]


TOKENS = [[5] * OUTPUT_TOKENS, [6] * OUTPUT_TOKENS]


async def test_near_ties_are_counted_and_anything_more_is_red() -> None:
    ours = Scripted("ours", tokens=TOKENS)
    found = await check(ours, Scripted("theirs", gaps=red(NEAR_TIE / 2)), 1, NEAR_TIE)
    assert (found.num_prompts, found.num_tokens, found.num_near_ties) == (2, 12, 1)
    assert found.most_off == NEAR_TIE / 2
    with pytest.raises(GateRed, match=r"ours: token 2 after prompt 1 \(40 tokens\) is 6; theirs"):
        await check(ours, Scripted("theirs", gaps=red(2 * NEAR_TIE)), 1, NEAR_TIE)
    with pytest.raises(GateRed):
        await check(ours, Scripted("theirs", gaps=red(float("nan"))), 1, NEAR_TIE)


async def test_too_few_tokens_are_red() -> None:
    with pytest.raises(GateRed, match=r"wrote \[6, 5\] tokens; 6 each"):
        await check(
            Scripted("ours", tokens=[TOKENS[0], TOKENS[1][1:]]), Scripted("theirs"), 1, NEAR_TIE
        )


def opened(folder: Path, mode: str) -> Setup:
    return Setup(
        checkpoint=str(folder),
        dtype="float32",
        mode=mode,
        num_threads=1,
        pool_tokens=512,
        max_model_len=512,
        max_num_batched_tokens=32,
        max_num_seqs=4,
    )


async def test_our_engine_passes_beside_transformers_and_answers_every_question(
    tmp_path: Path,
) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    baton, other = Baton(opened(folder, "plain")), Transformers(opened(folder, "dynamic"))
    found = await check(InProcess("baton", baton), InProcess("transformers", other), 1, NEAR_TIE)
    assert found.num_tokens == 2 * OUTPUT_TOKENS
    assert other.greedy([3, 4, 5], 8) == baton.greedy([3, 4, 5], 8)
    for engine in (baton, other):
        engine.prefill([3] * 40)
        # Prompts of different steps: the budget of one step holds one of the three.
        assert engine.decode([[3] * 30, [4] * 30, [5] * 30], 2, 5) > 0
    assert baton._scheduler.check_integrity() == []
    assert baton._scheduler.num_running == baton._scheduler.num_waiting == 0
    assert baton.pool_bytes == 512 * 2 * 2 * 2 * 8 * 4  # layers, K and V, KV heads, dims, bytes
    assert baton.fill_pool()
    assert not other.fill_pool()


async def test_weights_of_another_model_are_red(tmp_path: Path) -> None:
    ours = write_checkpoint(tmp_path / "ours")
    weights = tiny_weights(TINY_LLAMA)
    weights["model.norm.weight"] = weights["model.norm.weight"].flip(0)
    theirs = write_checkpoint(tmp_path / "theirs", TINY_LLAMA, weights)
    baton, other = Baton(opened(ours, "plain")), Transformers(opened(theirs, "dynamic"))
    with pytest.raises(GateRed, match="whose logit is"):
        await check(InProcess("baton", baton), InProcess("transformers", other), 1, 0.5)
