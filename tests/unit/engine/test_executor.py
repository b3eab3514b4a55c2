"""One tiny model, many ways to run it: the logits must not notice."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from baton.engine.executor import Executor
from baton.engine.kernels.compiled.build import CannotCompile
from baton.engine.models import backends, decoder
from baton.engine.plan import SampledToken, SequenceChunk, StepPlan
from baton.engine.sampling.drafts import kept_draws
from baton.engine.sampling.draw import draw_tokens
from baton.engine.sampling.finite import NOT_FINITE, zero_bad_rows
from baton.protocol.errors import ConfigError, InternalError
from baton.protocol.sampling import SamplingParams, TokenLogprobs
from tests.support.tiny_checkpoint import TINY_LLAMA, TINY_MISTRAL, write_checkpoint

GREEDY = SamplingParams(temperature=0.0)
TOLERANCE = 2e-5
PROMPT = tuple(int(t) for t in np.random.default_rng(1).integers(0, 61, 200))


def load(folder: Path, **changes: Any) -> Executor:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "num_blocks": 64,
        "block_size": 8,
        "num_threads": 1,
    }
    return Executor.load(folder, **(settings | changes))


@pytest.fixture(scope="module", params=["llama", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"llama": TINY_LLAMA, "mistral": TINY_MISTRAL}[request.param]
    return write_checkpoint(tmp_path_factory.mktemp("model"), config)


@pytest.fixture(params=["compiled", "plain torch"])
def is_compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The second time round, no compiler is found."""
    if request.param == "compiled":
        return True

    def load_library(num_threads: int) -> None:
        raise CannotCompile("no C++ compiler on PATH")

    monkeypatch.setattr(backends, "load_library", load_library)
    return False


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def chunk(
    tokens: tuple[int, ...],
    start: int,
    table: tuple[int, ...],
    *,
    samples: bool = True,
    seq_id: str = "s",
    sampling: SamplingParams = GREEDY,
) -> SequenceChunk:
    return SequenceChunk(seq_id, tokens, start, table, samples, sampling)


def one_shot(folder: Path, tokens: tuple[int, ...]) -> torch.Tensor:
    """Logits after ``tokens``, all in one chunk of a fresh cache."""
    table = tuple(range(-(-len(tokens) // 8)))
    return load(folder).forward_logits(StepPlan(0, (chunk(tokens, 0, table),)))[0]


def same(found: torch.Tensor, expected: torch.Tensor, is_compiled: bool) -> bool:
    """To the bit where the kernels are compiled."""
    if is_compiled:
        return torch.equal(found, expected)
    return torch.allclose(found, expected, atol=TOLERANCE)


def poison(executor: Executor) -> None:
    """NaN in every block: what is unused must never count."""
    with torch.inference_mode():
        executor._cache.blocks.fill_(float("nan"))


@pytest.mark.parametrize("sizes", [(200,), (1,) * 30, (8, 8, 8), (3, 50, 1, 1, 70), (64, 1, 65)])
def test_chunks_do_not_change_the_logits(
    folder: Path, sizes: tuple[int, ...], is_compiled: bool
) -> None:
    executor = load(folder)
    poison(executor)
    table = tuple(int(b) for b in np.random.default_rng(2).permutation(64)[:25])
    start = 0
    for n, size in enumerate(sizes):
        tokens = PROMPT[start : start + size]
        last = n == len(sizes) - 1
        plan = StepPlan(n, (chunk(tokens, start, table, samples=last),))
        logits = executor.forward_logits(plan)
        assert len(logits) == last
        start += size
    assert same(logits[0], one_shot(folder, PROMPT[:start]), is_compiled)


def test_a_mixed_batch_gives_what_each_sequence_gives_alone(
    folder: Path, is_compiled: bool
) -> None:
    """Decodes of unlike lengths, prompts from 0, later chunks; results in plan order."""
    lengths = {"a": 150, "b": 1, "c": 33, "d": 90, "e": 64, "f": 7, "g": 17}
    new = {"a": 1, "b": 1, "c": 33, "d": 40, "e": 1, "f": 1, "g": 2}
    executor = load(folder, num_blocks=128)
    poison(executor)
    free = [int(b) for b in np.random.default_rng(3).permutation(128)]
    tables, tokens = {}, {}
    for n, (name, length) in enumerate(lengths.items()):
        tables[name] = tuple(free.pop() for _ in range(-(-length // 8)))
        tokens[name] = PROMPT[n : n + length]
        cached = length - new[name]
        if cached:
            plan = StepPlan(0, (chunk(tokens[name][:cached], 0, tables[name], samples=False),))
            executor.execute(plan)
    chunks = tuple(
        chunk(tokens[s][-new[s] :], lengths[s] - new[s], tables[s], samples=s != "d", seq_id=s)
        for s in ("e", "c", "a", "d", "f", "g", "b")
    )
    plan = StepPlan(1, chunks)
    logits = executor.forward_logits(plan)
    result = executor.execute(plan)
    assert [t.seq_id for t in result.sampled] == ["e", "c", "a", "f", "g", "b"]
    assert [t.token_id for t in result.sampled] == logits.argmax(-1).tolist()
    for row, sampled in zip(logits, result.sampled, strict=True):
        assert same(row, one_shot(folder, tokens[sampled.seq_id]), is_compiled)


def test_a_step_without_samples_computes_no_logits(llama: Path) -> None:
    executor = load(llama)
    result = executor.execute(StepPlan(3, (chunk(PROMPT[:9], 0, (1, 2), samples=False),)))
    assert (result.step, result.sampled) == (3, ())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_sequence_continues_elsewhere(folder: Path, dtype: str) -> None:
    source, target = load(folder, dtype=dtype), load(folder, dtype=dtype, block_size=16)
    assert source.layout == target.layout
    table, other = (9, 3, 4, 1, 50, 2), (7, 0, 5)
    first = source.execute(StepPlan(0, (chunk(PROMPT[:45], 0, table),)))
    for layer in range(source.spec.num_layers):
        for start, count in ((0, 30), (30, 15)):
            payload = source.read_kv(table, start, count, layer, 1)
            assert payload.nbytes == count * source.layout.bytes_per_token_layer
            target.write_kv(other, start, count, layer, 1, payload)
    plan = chunk((first.sampled[0].token_id,), 45, table)
    here = source.forward_logits(StepPlan(1, (plan,)))
    there = target.forward_logits(StepPlan(1, (chunk(plan.token_ids, 45, other),)))
    assert torch.equal(here, there)


def test_layers_are_told_of_once_their_kv_can_be_read(folder: Path) -> None:
    """Beside a chunk of one group of layers, of which nothing is told."""
    executor = load(folder)
    num_layers = executor.spec.num_layers
    table, told = (9, 3, 4), {}

    def tell(count: int) -> None:
        told[count] = bytes(executor.read_kv(table, 0, 20, 0, count))

    grouped = replace(chunk(PROMPT[:16], 0, (1, 2), samples=False), num_layers=1)
    plan = StepPlan(0, (chunk(PROMPT[:20], 0, table), grouped))
    executor.execute(plan, range(1, num_layers + 1), tell)
    assert list(told) == list(range(1, num_layers + 1))
    for count, payload in told.items():
        assert payload == bytes(executor.read_kv(table, 0, 20, 0, count))
    marked: list[int] = []
    executor.execute(plan, (2,), marked.append)
    assert marked == [2]


def test_lower_precision_stays_near(llama: Path) -> None:
    exact = one_shot(llama, PROMPT[:60])
    plan = StepPlan(0, (chunk(PROMPT[:60], 0, tuple(range(8))),))
    rounded = load(llama, dtype="bfloat16").forward_logits(plan)[0]
    assert rounded.dtype == torch.float32
    difference = (rounded - exact).abs().max()
    assert 0 < difference < 0.03 * exact.abs().max()


def test_a_draw_is_keyed_by_its_own_position(llama: Path) -> None:
    """Position 20 for the token that follows positions 0 to 19."""
    executor = load(llama)
    for seed in range(20):
        params = SamplingParams(temperature=5.0, seed=seed)
        plan = StepPlan(0, (chunk(PROMPT[15:20], 15, (0, 1, 2), sampling=params),))
        expected = draw_tokens(executor.forward_logits(plan), [params], [20]).tolist()
        assert [t.token_id for t in executor.execute(plan).sampled] == expected


def test_the_cut_into_steps_does_not_change_a_draw(llama: Path) -> None:
    params = SamplingParams(temperature=1.0, seed=77)
    whole = load(llama).execute(StepPlan(0, (chunk(PROMPT[:20], 0, (0, 1, 2), sampling=params),)))
    executor = load(llama)
    executor.execute(StepPlan(0, (chunk(PROMPT[:19], 0, (5, 6, 7), samples=False),)))
    last = executor.execute(StepPlan(1, (chunk(PROMPT[19:20], 19, (5, 6, 7), sampling=params),)))
    assert last.sampled == whole.sampled


def test_logits_that_are_not_finite_cost_their_own_sequence(llama: Path) -> None:
    """Of three that begin, go on or wait behind drafts, one reads KV that is NaN."""
    sampled = SamplingParams(temperature=1.0, seed=5, num_logprobs=2)
    begins = chunk(PROMPT[:4], 0, (0,), seq_id="begins", sampling=sampled)
    guesses = replace(chunk(PROMPT[:12], 0, (3, 4), seq_id="guesses"), num_drafts=3)
    alone = [load(llama).execute(StepPlan(0, (c,))) for c in (begins, guesses)]
    executor = load(llama)
    poison(executor)
    bad = chunk(PROMPT[:1], 8, (1, 2), seq_id="bad", sampling=sampled)
    result = executor.execute(StepPlan(0, (begins, bad, guesses)))
    [failed] = result.failed
    assert (failed.seq_id, failed.code, failed.retryable) == ("bad", "internal", True)
    assert "not finite" in failed.message
    others = tuple(t for t in result.sampled if t.seq_id != "bad")
    assert [(t.seq_id, t.token_id) for t in others] == [
        (t.seq_id, t.token_id) for one in alone for t in one.sampled
    ]
    assert all(token.logprobs is None or math.isfinite(token.logprobs.logprob) for token in others)


def test_a_draft_row_that_is_not_finite_counts_where_the_draft_is_right() -> None:
    drafted = replace(chunk((7, 8, 9), 0, (0,), seq_id="s"), num_drafts=2)
    errors = {1: NOT_FINITE}
    right = tuple(SampledToken("s", token_id) for token_id in (8, 0, 0))
    wrong = tuple(SampledToken("s", token_id) for token_id in (1, 0, 0))
    assert [f.retryable for f in kept_draws([drafted], right, errors)[1]] == [True]
    assert kept_draws([drafted], wrong, errors) == (wrong[:1], ())


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_row_is_bad_where_one_logit_is(value: str) -> None:
    logits = torch.tensor([[1.0, float("-inf")], [0.5, float(value)], [float("-inf")] * 2])
    assert zero_bad_rows(logits) == [1, 2]
    assert logits.tolist() == [[1.0, float("-inf")], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ((), "no chunks"),
        ((chunk((), 0, (0,)),), "without tokens"),
        ((chunk((1,), 0, (0,)), chunk((2,), 0, (1,))), "twice"),
        ((chunk((61,), 0, (0,)),), "token ids must lie in 0 to 60"),
        ((chunk((-1,), 0, (0,)),), "token ids must lie in 0 to 60"),
        ((chunk((1,), 8, (0,)),), "1 blocks cover fewer"),
        ((chunk((1,), -1, (0,)),), "cover fewer"),
        ((chunk((1,), 0, (64,)),), "block ids must lie in 0 to 63"),
        ((chunk((1,), 0, (-1,)),), "block ids must lie in 0 to 63"),
    ],
)
def test_plans_that_cannot_be_run_are_refused(
    llama: Path, chunks: tuple[SequenceChunk, ...], message: str
) -> None:
    with pytest.raises(InternalError, match=message):
        load(llama).execute(StepPlan(0, chunks))


def test_without_a_compiler_deterministic_mode_is_refused(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    backends.load_library.cache_clear()
    try:
        with pytest.raises(ConfigError, match="install the package g\\+\\+"):
            load(llama, deterministic=True)
    finally:
        backends.load_library.cache_clear()


def test_settings_that_cannot_be_met_are_config_errors(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="dtype is 'int8'; allowed: float32"):
        load(llama, dtype="int8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device"):
        load(llama, device="cuda")


# --- log-probabilities of the prompt


@pytest.mark.parametrize("sizes", [(60,), (1, 1, 58), (25, 35), (59, 1), (7,) * 8 + (4,)])
def test_prompt_logprobs_do_not_notice_the_chunks(
    folder: Path, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "SCORED_ROWS_AT_ONCE", 16)
    executor, prompt, table = load(folder), PROMPT[:60], tuple(range(8))
    expected = torch.stack([one_shot(folder, prompt[:n]) for n in range(1, 60)]).log_softmax(-1)
    found: list[TokenLogprobs] = []
    start = 0
    for n, size in enumerate(sizes):
        asking = replace(
            chunk(prompt[start : start + size], start, table, samples=start + size == 60),
            prompt_ids=prompt,
            num_prompt_logprobs=3 if start + 1 < 60 else -1,
        )
        beside = chunk(PROMPT[: n + 2], 0, (20 + n,) * 2, seq_id="other")
        result = executor.execute(StepPlan(n, (beside, asking)))
        assert len(result.sampled) == 1 + asking.samples
        for part in result.prompt_logprobs:
            assert (part.seq_id, part.start) == ("s", len(found) + 1)
            found += part.logprobs
        start += size
    assert len(found) == 59
    for place, one in enumerate(found):
        row = expected[place]
        assert one.logprob == pytest.approx(row[prompt[place + 1]].item(), abs=TOLERANCE * 5)
        best = row.topk(3)
        assert [t.logprob for t in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_prompt_logprobs_that_are_not_finite_cost_their_own_sequence(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a bad row and good ones are scored in one piece, and its draw is bad too."""
    monkeypatch.setattr(decoder, "SCORED_ROWS_AT_ONCE", 7)

    def asking(seq_id: str, start: int, table: tuple[int, ...], *, samples: bool) -> SequenceChunk:
        tokens = PROMPT[start : start + 12]
        bare = chunk(tokens, start, table, samples=samples, seq_id=seq_id)
        return replace(bare, prompt_ids=PROMPT[: start + 12], num_prompt_logprobs=2)

    well = asking("well", 0, (4, 5), samples=True)
    alone = load(llama).execute(StepPlan(0, (well,)))
    executor = load(llama)
    poison(executor)
    sick = asking("sick", 8, (0, 1, 2), samples=True)
    unfinished = replace(asking("unfinished", 8, (6, 7, 8), samples=False), prompt_ids=PROMPT)
    result = executor.execute(StepPlan(0, (sick, unfinished, well)))
    assert [(f.seq_id, f.retryable) for f in result.failed] == [
        ("sick", True),
        ("unfinished", True),
    ]
    [part] = result.prompt_logprobs
    [expected] = alone.prompt_logprobs
    assert (part.seq_id, part.start) == ("well", 1)
    assert [one.logprob for one in part.logprobs] == pytest.approx(
        [one.logprob for one in expected.logprobs], abs=1e-4
    )
    assert [t.token_id for t in result.sampled if t.seq_id == "well"] == [
        t.token_id for t in alone.sampled
    ]
