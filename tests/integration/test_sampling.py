"""Rules of a draw through real processes: the same tokens whoever computes them, and the
prompt's own log-probabilities against transformers."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import httpx
import pytest
import torch

from baton.client import Choice
from baton.protocol.config import EngineConfig
from tests.support.clusters import (
    Cluster,
    assert_no_residue,
    colocated_config,
    running_cluster,
    tiny_config,
    until,
)
from tests.support.prompts import prompt_of
from tests.support.reference import prompt_logprobs

NUM_TOKENS = 48
RULES: dict[str, Any] = {
    "max_tokens": NUM_TOKENS,
    "temperature": 1.1,
    "top_p": 0.97,
    "min_p": 0.01,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
    "logit_bias": {10: 1.5, 40: -100},
    "bad_token_ids": [40, 41],
    "bad_words": ["self", "return"],
    "min_tokens": 30,
}
PROMPTS = [prompt_of(20 + 17 * seed, seed) for seed in range(6)]


async def _ruled(cluster: Cluster, on_first: asyncio.Event | None = None) -> list[Choice]:
    async def one(seed: int, ids: list[int]) -> list[Choice]:
        async with cluster.client.stream(ids, seed=seed, n=2, **RULES) as stream:
            async for chunk in stream:
                if on_first is not None and chunk.seq >= 8:
                    on_first.set()
            return [*(await stream.completion()).choices]

    answers = await asyncio.gather(*(one(seed, ids) for seed, ids in enumerate(PROMPTS)))
    return [choice for choices in answers for choice in choices]


def _ids(choices: list[Choice]) -> list[list[int]]:
    return [[t.token_id for t in c.tokens] for c in choices]


async def test_rules_hold_split_colocated_and_after_a_lost_worker(tmp_path):
    async with running_cluster(colocated_config(), tmp_path) as cluster:
        colocated = await _ruled(cluster)
        await assert_no_residue(cluster)
    small_steps = EngineConfig(max_num_batched_tokens=32)
    async with running_cluster(tiny_config(prefill=small_steps), tmp_path) as cluster:
        split = await _ruled(cluster)
        await assert_no_residue(cluster)
    config = tiny_config(num_decodes=2)
    async with running_cluster(config, tmp_path, supervise=True) as cluster:
        under_way, pid = asyncio.Event(), cluster.pid_of("d-0")
        answers = asyncio.ensure_future(_ruled(cluster, under_way))
        await under_way.wait()
        os.kill(pid, signal.SIGKILL)
        recovered = await answers
        await until(lambda: cluster.pid_of("d-0") != pid, "the worker was started again")
    assert _ids(split) == _ids(colocated)
    assert _ids(recovered) == _ids(colocated)
    attempts = {c.timeline.spans[-1].attributes["attempts"] for c in recovered if c.timeline}
    assert 2 in attempts, "the lost worker had some of them"

    for choice in colocated:
        assert len(choice.tokens) >= RULES["min_tokens"]
        assert not {t.token_id for t in choice.tokens} & {40, 41}
    assert len({tuple(ids) for ids in _ids(colocated)}) == len(colocated), "each seed its own"


@pytest.mark.parametrize("prefill_tokens", [32, 2048])
async def test_prompt_logprobs_are_those_of_transformers(tmp_path, prefill_tokens):
    prompts = [prompt_of(length, length) for length in (2, 33, 150)]
    config = tiny_config(prefill=EngineConfig(max_num_batched_tokens=prefill_tokens))
    async with running_cluster(config, tmp_path) as cluster:
        for _ in ("fresh", "behind a filled prefix cache"):
            found = await asyncio.gather(
                *(
                    cluster.client.generate(ids, max_tokens=3, temperature=0.0, prompt_logprobs=2)
                    for ids in prompts
                )
            )
            for ids, completion in zip(prompts, found, strict=True):
                _assert_scores(ids, completion.choices[0])
        await _echo_has_the_same(cluster, prompts[2], found[2].choices[0])
        await assert_no_residue(cluster)


def _assert_scores(ids: list[int], choice: Choice) -> None:
    expected = prompt_logprobs(ids)
    first, *others = choice.prompt_tokens
    assert first.logprobs is None
    assert [t.token_id for t in choice.prompt_tokens] == ids
    for row, token in zip(expected, others, strict=True):
        assert token.logprobs is not None
        assert token.logprobs.logprob == pytest.approx(row[token.token_id].item(), abs=1e-3)
        best = torch.topk(row, 2).values.tolist()
        assert [t.logprob for t in token.logprobs.top] == pytest.approx(best, abs=1e-3)


async def _echo_has_the_same(cluster: Cluster, ids: list[int], choice: Choice) -> None:
    body = {"prompt": ids, "echo": True, "logprobs": 2, "max_tokens": 0}
    async with httpx.AsyncClient(base_url=cluster.http_url, timeout=60) as http:
        answer = (await http.post("/v1/completions", json=body)).json()
    found = answer["choices"][0]
    text = await cluster.client.detokenize(ids)
    assert found["text"] == text
    assert found["logprobs"]["text_offset"][-1] < len(text)
    scores = [t.logprobs.logprob for t in choice.prompt_tokens if t.logprobs is not None]
    first, *others = found["logprobs"]["token_logprobs"]
    assert first is None
    assert others == pytest.approx(scores, abs=1e-4)
