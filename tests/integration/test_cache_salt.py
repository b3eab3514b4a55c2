"""Prompts are shared among requests of one salt, over gRPC and HTTP, and never across salts."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

from baton.client import WorkerLoad
from tests.support.clusters import Cluster, running_cluster, settled, tiny_config
from tests.support.prompts import prompt_of

PROMPT = prompt_of(200, 7)
CHAT = [{"role": "user", "content": "def median(values):\n" * 12}]


async def counts(cluster: Cluster) -> dict[str, WorkerLoad]:
    return {worker.worker_id: worker for worker in (await settled(cluster)).workers}


async def hit_tokens(cluster: Cluster) -> int:
    return (await counts(cluster))["p-0"].num_cache_hit_tokens


async def completed(cluster: Cluster, cache_salt: str | None) -> list[int]:
    answer = await cluster.client.generate(
        PROMPT, max_tokens=8, temperature=0.0, ignore_eos=True, cache_salt=cache_salt
    )
    return [token.token_id for token in answer.choices[0].tokens]


async def test_a_prompt_is_shared_within_one_salt_alone(tmp_path):
    async with running_cluster(tiny_config(), tmp_path) as cluster:
        first = await completed(cluster, "one")
        before = await hit_tokens(cluster)
        for salt in ("two", None, "one "):
            assert await completed(cluster, salt) == first
            assert await hit_tokens(cluster) == before, f"{salt!r} met the blocks of another"
        for count, salt in enumerate(("one", "two", None, "one "), start=1):
            assert await completed(cluster, salt) == first
            hits = await hit_tokens(cluster) - before
            assert 0.9 * len(PROMPT) * count < hits <= len(PROMPT) * count

        async with httpx.AsyncClient(base_url=cluster.http_url, timeout=60.0) as http:
            await hits_over_http(cluster, http)
            await metrics_agree(cluster, http)


async def hits_over_http(cluster: Cluster, http: httpx.AsyncClient) -> None:
    """What gRPC left in the cache is there for HTTP; a chat keeps to its salt as well."""
    gained = []
    for path, prompt, salt in (
        ("completions", {"prompt": PROMPT}, "one"),
        ("completions", {"prompt": PROMPT}, "three"),
        ("chat/completions", {"messages": CHAT}, "one"),
        ("chat/completions", {"messages": CHAT}, "two"),
        ("chat/completions", {"messages": CHAT}, "one"),
    ):
        before = await hit_tokens(cluster)
        body = {**prompt, "cache_salt": salt, "max_tokens": 4, "temperature": 0.0}
        response = await http.post(f"/v1/{path}", json=body)
        assert response.status_code == 200, response.text
        gained.append(await hit_tokens(cluster) - before > 0)
    assert gained == [True, False, False, False, True]


async def metrics_agree(cluster: Cluster, http: httpx.AsyncClient) -> None:
    load = (await counts(cluster))["p-0"]
    found = {
        sample.name: sample.value
        for family in text_string_to_metric_families((await http.get("/metrics")).text)
        for sample in family.samples
        if sample.labels.get("worker") == "p-0"
    }
    assert found["baton:prefix_cache_hits_total"] == load.num_cache_hit_tokens > 0
    assert found["baton:prefix_cache_queries_total"] == load.num_cache_queried_tokens
