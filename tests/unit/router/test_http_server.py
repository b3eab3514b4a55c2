"""The HTTP port itself: start, stop, health, readiness, version and metrics."""

from __future__ import annotations

import asyncio
import json
import signal

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from baton.protocol.config import RouterConfig
from baton.protocol.errors import ConfigError, Overloaded
from tests.support.http_serving import new_http_server, plain_client, serving_http
from tests.support.scripted_frontend import Script, ScriptedFrontend, tokens


async def test_a_port_in_use_is_named_with_the_way_out():
    async with serving_http(ScriptedFrontend()) as base_url:
        port = int(base_url.rsplit(":", 1)[1])
        second = new_http_server(ScriptedFrontend(), RouterConfig(http_port=port))
        with pytest.raises(ConfigError, match=rf"port {port}.*router\.http_port") as caught:
            await second.start()
    assert caught.value.param == "router.http_port"


async def test_an_address_that_is_not_ours_is_a_config_error():
    server = new_http_server(ScriptedFrontend(), RouterConfig(host="192.0.2.1", http_port=0))
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        await server.start()


async def test_signals_stay_with_the_process():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    async with serving_http(ScriptedFrontend()):
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


async def test_the_port_is_free_after_stop_and_no_task_is_left():
    before = asyncio.all_tasks()
    server = new_http_server(ScriptedFrontend())
    port = await server.start()
    async with plain_client(f"http://127.0.0.1:{port}") as http:
        assert (await http.get("/health")).status_code == 200
        await server.stop()
    assert asyncio.all_tasks() == before
    again = new_http_server(ScriptedFrontend(), RouterConfig(http_port=port))
    assert await again.start() == port
    await again.stop()


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_aborts_what_is_still_running_after_the_grace(stream):
    frontend = ScriptedFrontend(Script(stall_after=1))
    server = new_http_server(frontend)
    port = await server.start()
    before = asyncio.all_tasks()
    async with plain_client(f"http://127.0.0.1:{port}") as http:
        asking = asyncio.ensure_future(
            http.post("/v1/completions", json={"prompt": "x", "stream": stream})
        )
        await asyncio.wait_for(frontend.until(lambda f: f.num_outputs == 1), 10)
        await server.stop(grace_s=0)
        with pytest.raises(httpx.TransportError):
            await asking
    assert not frontend.running
    assert len(frontend.closed) == 1
    assert asyncio.all_tasks() <= before


async def test_stop_lets_a_running_answer_finish_within_the_grace():
    frontend = ScriptedFrontend(Script(choices=(tokens("x" * 1_000, *"y" * 1_000),)))
    server = new_http_server(frontend)
    port = await server.start()
    async with plain_client(f"http://127.0.0.1:{port}") as http:
        asking = asyncio.ensure_future(
            http.post("/v1/completions", json={"prompt": "x", "stream": True})
        )
        await asyncio.wait_for(frontend.until(lambda f: f.num_outputs > 0), 10)
        await server.stop(grace_s=10)
        assert (await asking).text.endswith("data: [DONE]\n\n")


async def test_health_ready_and_version():
    frontend = ScriptedFrontend()
    async with serving_http(frontend) as base_url, plain_client(base_url) as http:
        assert (await http.get("/ready")).status_code == 200
        frontend.not_ready = "no decode worker has joined"
        ready = await http.get("/ready")
        assert ready.status_code == 503
        assert ready.headers["retry-after"] == "1"
        assert "no decode worker has joined" in ready.json()["error"]["message"]
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/version")).json()["version"]


def samples(text: str) -> dict[str, float]:
    """name{labels without the model} to value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            inner = ",".join(f"{k}={v}" for k, v in sorted(labels.items()))
            found[f"{sample.name}{{{inner}}}" if inner else sample.name] = sample.value
    return found


async def scrape(http: httpx.AsyncClient) -> dict[str, float]:
    response = await http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    return samples(response.text)


async def test_metrics_count_what_was_served():
    frontend = ScriptedFrontend(
        lambda spec: Script(finish_reason="stop" if spec.n > 1 else "length")
    )
    async with serving_http(frontend) as base_url, plain_client(base_url) as http:
        await http.post("/v1/completions", json={"prompt": "1234567"})
        await http.post("/v1/completions", json={"prompt": "12", "n": 2, "stream": True})
        found = await scrape(http)
    assert found["baton:prompt_tokens_total"] == 9
    assert found["baton:generation_tokens_total"] == 9
    assert found["baton:request_success_total{finished_reason=length}"] == 1
    assert found["baton:request_success_total{finished_reason=stop}"] == 2
    assert found["baton:time_to_first_token_seconds_count"] == 2
    assert found["baton:e2e_request_latency_seconds_count"] == 2
    assert found["baton:inter_token_latency_seconds_count"] == 6
    assert found["baton:second_token_gap_seconds_count"] == 3
    assert found["baton:request_generation_tokens_sum"] == 9


async def test_metrics_count_failures_and_aborts():
    def script(spec):
        if len(spec.prompt_ids) == 1:
            return Script(error=Overloaded("full"), error_after=0)
        return Script(stall_after=1)

    frontend = ScriptedFrontend(script)
    async with serving_http(frontend) as base_url, plain_client(base_url) as http:
        await http.post("/v1/completions", json={"prompt": "x"})
        asking = asyncio.ensure_future(http.post("/v1/completions", json={"prompt": "xx"}))
        await asyncio.wait_for(frontend.until(lambda f: f.num_outputs == 1), 10)
        asking.cancel()
        await asyncio.wait_for(frontend.until(lambda f: f.closed), 10)
        found = await scrape(http)
    assert found["baton:request_errors_total{code=overloaded}"] == 1
    assert found["baton:request_success_total{finished_reason=abort}"] == 1
    assert "baton:e2e_request_latency_seconds_count" in found
    assert found["baton:e2e_request_latency_seconds_count"] == 0


async def test_metrics_show_the_workers_loads():
    frontend = ScriptedFrontend()
    worker = "{role=decode,worker=d-0}"
    async with serving_http(frontend) as base_url, plain_client(base_url) as http:
        found = await scrape(http)
        assert found[f"baton:kv_cache_usage_perc{worker}"] == pytest.approx(12 / 512)
        assert found[f"baton:num_preemptions_total{worker}"] == 4
        assert found[f"baton:num_swapped_out_total{worker}"] == 10
        assert found[f"baton:prefix_cache_queries_total{worker}"] == 1_000
        assert found[f"baton:prefix_cache_hits_total{worker}"] == 750
        assert found[f"baton:spec_decode_num_draft_tokens_total{worker}"] == 40
        assert found[f"baton:spec_decode_num_accepted_tokens_total{worker}"] == 33
        assert found[f"baton:kv_received_bytes_total{worker}"] == 2**40
        assert found[f"baton:worker_integrity_errors{worker}"] == 1
        assert found["baton:num_requests_running"] == 0
        assert found["baton:ready"] == 1
        frontend.not_ready = "nobody"
        assert (await scrape(http))["baton:ready"] == 0


async def test_labels_do_not_grow_with_what_clients_send():
    frontend = ScriptedFrontend()
    async with serving_http(frontend) as base_url, plain_client(base_url) as http:
        before = len((await http.get("/metrics")).text.splitlines())
        for i in range(5):
            await http.post("/v1/completions", json={"model": f"m{i}", "prompt": "x"})
            await http.get(f"/nowhere/{i}")
            body = json.dumps({"prompt": "x", "user": f"u{i}", "request_id": f"r{i}"})
            await http.post(
                "/v1/completions", content=body, headers={"content-type": "application/json"}
            )
        after = (await http.get("/metrics")).text
    assert "m3" not in after
    assert len(after.splitlines()) <= before + 4  # one finish reason appeared
