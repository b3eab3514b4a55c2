"""The same cluster through its doors: the SDK, the openai package, plain HTTP."""

from __future__ import annotations

import asyncio
import math

import httpx
import openai
import pytest
import torch

from baton import BatonError
from baton.protocol.errors import Cancelled, DeadlineExceeded, PromptTooLong, RequestConflict
from tests.support.clusters import Cluster, assert_no_residue, running_cluster, tiny_config
from tests.support.reference import reference_logprobs

PROMPT = "def read_config(path):\n"


def _openai(cluster: Cluster) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{cluster.http_url}/v1", api_key="none", max_retries=0, timeout=60
    )


async def test_one_cluster_through_all_doors(tmp_path):
    """One start, many questions: a cluster costs seconds."""
    async with running_cluster(tiny_config(), tmp_path) as cluster:
        async with _openai(cluster) as client:
            await _openai_equals_sdk(cluster, client)
            await _stop_string_ends_it_everywhere(cluster, client)
            await _logprobs_are_those_of_transformers(client)
            await _chat(cluster, client)
            await _bad_input_costs_nobody_else(cluster, client)
        await _abort_reaches_the_stream(cluster)
        await _deadline_names_the_hop(cluster)
        await _request_id_is_taken_while_it_runs(cluster)
        await _metrics_and_health(cluster)
        await assert_no_residue(cluster)


async def _openai_equals_sdk(cluster: Cluster, client: openai.AsyncOpenAI) -> None:
    ours = await cluster.client.generate(PROMPT, max_tokens=40, temperature=0.0)
    whole = await client.completions.create(
        model="baton-tiny", prompt=PROMPT, max_tokens=40, temperature=0
    )
    assert whole.choices[0].text == ours.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens == ours.usage.completion_tokens
    stream = await client.completions.create(
        model="baton-tiny",
        prompt=PROMPT,
        max_tokens=40,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].text for c in chunks if c.choices) == ours.choices[0].text
    assert chunks[-1].usage == whole.usage


async def _stop_string_ends_it_everywhere(cluster: Cluster, client: openai.AsyncOpenAI) -> None:
    free = await cluster.client.generate(PROMPT, max_tokens=60, temperature=0.0)
    text = free.choices[0].text
    stop = text[25:29]
    expected = text[: text.index(stop)]
    stopped = await client.completions.create(
        model="baton-tiny", prompt=PROMPT, max_tokens=60, temperature=0, stop=[stop]
    )
    assert stopped.choices[0].text == expected
    assert stopped.choices[0].finish_reason == "stop"


async def _logprobs_are_those_of_transformers(client: openai.AsyncOpenAI) -> None:
    """Of the first token (prefill worker) and the rest (decode worker) alike."""
    prompt_ids = [0, *range(300, 340)]
    answer = await client.completions.create(
        model="baton-tiny",
        prompt=prompt_ids,
        max_tokens=12,
        temperature=0,
        logprobs=3,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    expected = reference_logprobs(prompt_ids, 12)
    assert len(logprobs.token_logprobs) == 12
    for ours, top, theirs in zip(
        logprobs.token_logprobs, logprobs.top_logprobs, expected, strict=True
    ):
        best = torch.topk(theirs, 3).values.tolist()
        assert math.isclose(ours, best[0], abs_tol=1e-3)
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(best, abs=1e-3)


async def _chat(cluster: Cluster, client: openai.AsyncOpenAI) -> None:
    messages = [{"role": "user", "content": "Write a function that adds two numbers."}]
    answer = await client.chat.completions.create(
        model="baton-tiny", messages=messages, max_completion_tokens=16, temperature=0, n=2, seed=3
    )
    assert [c.index for c in answer.choices] == [0, 1]
    assert answer.choices[0].message.content == answer.choices[1].message.content, "greedy"
    ours = await cluster.client.chat(messages, max_tokens=16, temperature=0.0)
    assert ours.choices[0].text == answer.choices[0].message.content


async def _bad_input_costs_nobody_else(cluster: Cluster, client: openai.AsyncOpenAI) -> None:
    async with cluster.client.stream(
        PROMPT, max_tokens=150, temperature=0.0, ignore_eos=True
    ) as stream:
        await anext(stream)
        for bad in (
            {"prompt": ""},
            {"prompt": PROMPT, "temperature": -1},
            {"prompt": PROMPT, "top_p": 0},
            {"prompt": PROMPT, "n": 10_000},
            {"prompt": [5, 10**9]},
            {"prompt": [1] * 5_000},
            {"prompt": PROMPT, "stop": [str(i) for i in range(100)]},
            {"prompt": PROMPT, "max_tokens": 10**6},
        ):
            with pytest.raises(openai.BadRequestError):
                await client.completions.create(model="baton-tiny", **bad)
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="gpt-17", prompt=PROMPT)
        with pytest.raises(PromptTooLong):
            await cluster.client.generate([1] * 5_000)
        with pytest.raises(BatonError, match="temperature"):
            await cluster.client.generate(PROMPT, temperature=math.nan)
        completion = await stream.completion()
    assert completion.usage.completion_tokens == 150


async def _abort_reaches_the_stream(cluster: Cluster) -> None:
    async with cluster.client.stream(
        PROMPT, max_tokens=2_000, temperature=0.0, ignore_eos=True, request_id="to-abort"
    ) as stream:
        await anext(stream)
        assert await cluster.client.abort("to-abort")
        with pytest.raises(Cancelled):
            async for _ in stream:
                pass
    assert not await cluster.client.abort("to-abort"), "it is over"


async def _deadline_names_the_hop(cluster: Cluster) -> None:
    with pytest.raises(DeadlineExceeded) as caught:
        await cluster.client.generate(
            PROMPT, max_tokens=4_000, temperature=0.0, ignore_eos=True, timeout=0.5
        )
    assert caught.value.hop == "decode"


async def _request_id_is_taken_while_it_runs(cluster: Cluster) -> None:
    async with cluster.client.stream(
        PROMPT, max_tokens=500, temperature=0.0, ignore_eos=True, request_id="mine"
    ) as stream:
        await anext(stream)
        with pytest.raises(RequestConflict):
            await cluster.client.generate(PROMPT, request_id="mine")


async def _metrics_and_health(cluster: Cluster) -> None:
    async with httpx.AsyncClient(base_url=cluster.http_url) as http:
        answers = await asyncio.gather(*(http.get(p) for p in ("/health", "/ready", "/metrics")))
    assert [a.status_code for a in answers] == [200, 200, 200]
    assert "time_to_first_token_seconds_bucket" in answers[2].text
