"""The HTTP port as the real ``openai`` package sees it."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from baton.protocol.errors import InternalError, Overloaded, PeerError, RequestConflict, Unavailable
from baton.protocol.sampling import SamplingParams
from tests.support.http_serving import openai_client, plain_client, serving_http
from tests.support.scripted_frontend import Script, ScriptedFrontend, tokens
from tests.support.tiny_text import tiny_tokenizer

MODEL = "scripted"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def frontend():
    return ScriptedFrontend()


@pytest.fixture
async def url(frontend):
    async with serving_http(frontend) as base_url:
        yield base_url


@pytest.fixture
async def client(url):
    async with openai_client(url) as client:
        yield client


@pytest.fixture
async def http(url):
    async with plain_client(url) as client:
        yield client


async def read_all(stream, into):
    async for chunk in stream:
        into.append(chunk)


# --- whole answers


async def test_completion(client, frontend):
    answer = await client.completions.create(
        model=MODEL, prompt="def", max_tokens=7, temperature=0.5, top_p=0.9, seed=11
    )
    assert answer.object == "text_completion"
    assert answer.choices[0].text == "abc"
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is None
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
    }
    (spec,) = frontend.specs
    assert (spec.sampling.max_tokens, spec.sampling.temperature) == (7, 0.5)
    assert (spec.sampling.top_p, spec.sampling.seed, spec.n) == (0.9, 11, 1)


async def test_chat_completion_uses_the_template_and_max_completion_tokens(client, frontend):
    answer = await client.chat.completions.create(
        model=MODEL, messages=HELLO, max_completion_tokens=9, stop=["x", "y"]
    )
    assert answer.object == "chat.completion"
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", "abc")
    (spec,) = frontend.specs
    assert spec.sampling.max_tokens == 9
    assert spec.stop == ("x", "y")
    assert len(spec.prompt_ids) == len("user: hello\nassistant:")


async def test_a_chat_answer_may_take_all_the_room_and_a_completion_sixteen(client, frontend):
    await client.chat.completions.create(model=MODEL, messages=HELLO)
    await client.completions.create(model=MODEL, prompt="hello")
    chat, completion = frontend.specs
    assert chat.sampling.max_tokens == frontend.model.max_model_len - len(chat.prompt_ids)
    assert completion.sampling.max_tokens == 16


async def test_content_parts_of_text_are_joined(client, frontend):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": parts}], max_tokens=1
    )
    await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1)
    first, second = frontend.specs
    assert first.prompt_ids == second.prompt_ids


async def test_n_choices_and_a_random_seed(client, frontend):
    answer = await client.completions.create(model=MODEL, prompt="x", n=3)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 9
    assert answer.usage.prompt_tokens == 1
    await client.completions.create(model=MODEL, prompt="x", n=3)
    first, second = (spec.sampling.seed for spec in frontend.specs)
    assert first != second


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", 1),
        (["ab", "c"], 2),
        ([65, 66], 1),
        ([[65, 66], [67]], 2),
    ],
)
async def test_every_form_of_prompt(client, frontend, prompt, expected):
    answer = await client.completions.create(model=MODEL, prompt=prompt, n=2)
    assert [c.index for c in answer.choices] == list(range(2 * expected))
    assert len(frontend.specs) == expected
    assert answer.usage.prompt_tokens == sum(len(s.prompt_ids) for s in frontend.specs)
    assert len({s.request_id for s in frontend.specs}) == expected


async def test_choices_of_several_prompts_keep_their_order(url):
    by_prompt = {1: "one", 2: "two"}
    frontend = ScriptedFrontend(
        lambda spec: Script(choices=(tokens(by_prompt[len(spec.prompt_ids)]),))
    )
    async with serving_http(frontend) as base_url, openai_client(base_url) as client:
        answer = await client.completions.create(model=MODEL, prompt=["a", "bb"])
    assert [c.text for c in answer.choices] == ["one", "two"]


async def test_completion_logprobs():
    frontend = ScriptedFrontend(Script(choices=(tokens("a", "b", first_id=97, top=2),)))
    async with serving_http(frontend) as base_url, openai_client(base_url) as client:
        answer = await client.completions.create(model=MODEL, prompt="x", logprobs=2)
        stream = await client.completions.create(model=MODEL, prompt="x", logprobs=2, stream=True)
        chunks = [chunk async for chunk in stream]
    assert frontend.specs[0].sampling.num_logprobs == 2
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.top_logprobs) == 2
    assert logprobs.token_logprobs == [-0.5, -0.5]
    assert list(logprobs.top_logprobs[0].values()) == [-0.5, -1.5]
    assert logprobs.tokens[0] in logprobs.top_logprobs[0]
    assert logprobs.text_offset == [0, 1]
    assert [c.choices[0].logprobs.text_offset for c in chunks] == [[0], [1]]


async def test_chat_logprobs():
    frontend = ScriptedFrontend(Script(choices=(tokens("a", "b", first_id=97, top=2),)))
    async with serving_http(frontend) as base_url, openai_client(base_url) as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=HELLO, logprobs=True, top_logprobs=2
        )
    entries = answer.choices[0].logprobs.content
    assert [e.logprob for e in entries] == [-0.5, -0.5]
    assert [t.logprob for t in entries[0].top_logprobs] == [-0.5, -1.5]
    texts = [t.token for e in entries for t in e.top_logprobs]
    assert all(
        t.bytes == list(t.token.encode()) or t.bytes is None
        for e in entries
        for t in e.top_logprobs
    ), texts


# --- streams


async def test_streamed_completion_with_usage(client):
    stream = await client.completions.create(
        model=MODEL, prompt="def", stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].text for c in chunks[:-1]) == "abc"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None, None, "length"]
    assert [c.usage for c in chunks[:-1]] == [None] * 3
    assert chunks[-1].choices == []
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 3)


async def test_streamed_chat(client):
    stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True, n=2)
    chunks = [chunk async for chunk in stream]
    for index in (0, 1):
        deltas = [c.choices[0].delta for c in chunks if c.choices[0].index == index]
        assert [d.role for d in deltas] == ["assistant", None, None, None]
        assert "".join(d.content for d in deltas) == "abc"
    assert len({c.id for c in chunks}) == 1


async def test_bytes_of_a_stream(http):
    body = {
        "model": MODEL,
        "prompt": "def",
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    response = await http.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    usages = [json.loads(e.removeprefix("data: "))["usage"] for e in events]
    assert [u["completion_tokens"] for u in usages] == [1, 2, 3, 3]
    without = await http.post("/v1/completions", json={**body, "stream_options": None})
    assert "usage" not in without.text


async def test_chunks_arrive_while_the_answer_is_running(frontend):
    frontend = ScriptedFrontend(Script(stall_after=2))
    async with serving_http(frontend) as base_url, openai_client(base_url) as client:
        stream = await client.completions.create(model=MODEL, prompt="x", stream=True)
        texts = [(await anext(stream)).choices[0].text for _ in range(2)]
        assert texts == ["a", "b"]
        assert frontend.running
        await stream.close()
        await asyncio.wait_for(frontend.until(lambda f: f.closed), 10)


async def test_a_client_that_leaves_aborts_a_whole_answer_too():
    frontend = ScriptedFrontend(Script(stall_after=1))
    async with serving_http(frontend) as base_url, plain_client(base_url) as http:
        asking = asyncio.ensure_future(http.post("/v1/completions", json={"prompt": "x"}))
        await asyncio.wait_for(frontend.until(lambda f: f.num_outputs == 1), 10)
        asking.cancel()
        await asyncio.wait_for(frontend.until(lambda f: f.closed), 10)
        assert not frontend.running


async def test_a_client_that_leaves_aborts_all_prompts():
    frontend = ScriptedFrontend(Script(stall_after=1))
    async with serving_http(frontend) as base_url, openai_client(base_url) as client:
        stream = await client.completions.create(model=MODEL, prompt=["a", "b", "c"], stream=True)
        await anext(stream)
        await stream.close()
        await asyncio.wait_for(frontend.until(lambda f: len(f.closed) == 3), 10)


async def test_a_client_that_does_not_read_holds_the_stream_back():
    """Else a slow reader would make the router's memory grow."""
    num_tokens = 100_000
    script = Script(choices=(tokens(*"x" * num_tokens),), stall_after=num_tokens - 1)
    frontend = ScriptedFrontend(script)
    async with serving_http(frontend) as base_url, plain_client(base_url) as http:
        host, port = base_url.removeprefix("http://").split(":")
        body = json.dumps({"prompt": "x", "stream": True}).encode()
        _, writer = await asyncio.open_connection(host, int(port), limit=1_024)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(body), body)
        )
        await asyncio.wait_for(frontend.until(lambda f: f.num_outputs > 100), 10)
        # Calls that are answered in between prove that the server had its turns.
        before = -1
        while frontend.num_outputs != before:
            before = frontend.num_outputs
            for _ in range(20):
                await http.get("/health")
        assert frontend.num_outputs < num_tokens / 2
        writer.close()
        await asyncio.wait_for(frontend.until(lambda f: f.closed), 10)


# --- failures of the cluster


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (Overloaded("full", hop="router"), 429, "1"),
        (Unavailable("no worker", hop="router"), 503, "1"),
        (PeerError("worker p-0 died", hop="prefill"), 502, None),
        (RequestConflict("in use", hop="router"), 409, None),
        (InternalError("our fault", hop="decode"), 500, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_output_is_a_status(error, status, retry_after, stream):
    frontend = ScriptedFrontend(Script(error=error))
    async with serving_http(frontend) as base_url, openai_client(base_url) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            await client.completions.create(
                model=MODEL, prompt="x", stream=stream, extra_headers={"x-request-id": "mine"}
            )
    response = caught.value.response
    assert response.status_code == status
    assert response.headers.get("retry-after") == retry_after
    assert response.headers["x-should-retry"] == ("true" if error.retryable else "false")
    assert response.headers["x-request-id"] == "mine"
    told = response.json()["error"]
    assert (told["code"], told["hop"]) == (error.code, error.hop)
    assert (told["retryable"], told["request_id"]) == (error.retryable, "mine")
    assert told["message"] == error.message


@pytest.mark.parametrize("prompt", ["x", ["x", "y"]])
async def test_a_failure_in_mid_stream_is_an_event_and_never_a_finish(prompt):
    script = Script(error=PeerError("worker d-0 died", hop="decode"), error_after=2)
    frontend = ScriptedFrontend(script)
    async with serving_http(frontend) as base_url:
        async with openai_client(base_url) as client:
            stream = await client.completions.create(model=MODEL, prompt=prompt, stream=True)
            chunks = []
            with pytest.raises(openai.APIError, match="d-0 died"):
                await read_all(stream, into=chunks)
        async with plain_client(base_url) as http:
            raw = await http.post("/v1/completions", json={"prompt": prompt, "stream": True})
    assert len(chunks) >= 2
    assert all(c.choices[0].finish_reason is None for c in chunks)
    assert "[DONE]" not in raw.text
    last = json.loads(raw.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert (last["error"]["hop"], last["error"]["retryable"]) == ("decode", True)
    assert not frontend.running


async def test_our_own_bug_tells_no_insides(caplog):
    frontend = ScriptedFrontend(Script(error=ValueError("secret detail"), error_after=1))
    async with serving_http(frontend) as base_url, plain_client(base_url) as http:
        whole = await http.post("/v1/completions", json={"prompt": "x"})
        streamed = await http.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert whole.status_code == 500
    assert whole.json()["error"]["code"] == "internal"
    assert "secret" not in whole.text + streamed.text
    assert "[DONE]" not in streamed.text
    assert "secret detail" in caplog.text


async def test_a_stream_that_just_ends_is_a_failure():
    frontend = ScriptedFrontend(Script(choices=((),)))
    async with serving_http(frontend) as base_url, plain_client(base_url) as http:
        response = await http.post("/v1/completions", json={"prompt": "x"})
    assert response.status_code == 500
    assert "without a finish reason" in response.text


async def test_an_aborted_request_says_so():
    frontend = ScriptedFrontend(Script(stall_after=0))
    async with serving_http(frontend) as base_url, plain_client(base_url) as http:
        asking = asyncio.ensure_future(
            http.post("/v1/completions", json={"prompt": "x", "request_id": "mine"})
        )
        await asyncio.wait_for(frontend.until(lambda f: "mine" in f.running), 10)
        frontend.abort("mine")
        response = await asking
    assert response.json()["error"]["code"] == "cancelled"


# --- the request id


async def test_the_request_id_is_the_clients(http, frontend):
    response = await http.post(
        "/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "abc-1"}
    )
    assert response.headers["x-request-id"] == "abc-1"
    assert response.json()["id"] == "cmpl-abc-1"
    assert frontend.specs[0].request_id == "abc-1"
    fresh = await http.post("/v1/chat/completions", json={"messages": HELLO})
    assert fresh.headers["x-request-id"] == frontend.specs[1].request_id


async def test_a_malformed_request_id_is_refused_and_not_sent_back(http):
    response = await http.post(
        "/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "a b<script>"}
    )
    assert response.status_code == 400
    assert "x-request-id" in response.json()["error"]["message"]
    assert "x-request-id" not in response.headers


# --- models


async def test_models(client):
    listed = await client.models.list()
    assert [m.id for m in listed.data] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
        await client.models.retrieve("other")


async def test_the_sync_client_works_too(url):
    def ask() -> str:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            return client.completions.create(model=MODEL, prompt="x").choices[0].text

    assert await asyncio.to_thread(ask) == "abc"


async def test_every_sampling_field_reaches_the_core(client, frontend):
    await client.completions.create(
        model=MODEL,
        prompt="x",
        max_tokens=9,
        presence_penalty=0.5,
        frequency_penalty=-0.25,
        logit_bias={"7": -100, "3": 2},
        seed=4,
        extra_body={
            "min_p": 0.05,
            "repetition_penalty": 1.2,
            "allowed_token_ids": [1, 2, 3, 7],
            "bad_token_ids": [2],
            "bad_words": ["A", "BC"],
            "min_tokens": 3,
            "prompt_logprobs": 2,
        },
    )
    (spec,) = frontend.specs
    assert spec.sampling == SamplingParams(
        max_tokens=9,
        seed=4,
        min_p=0.05,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=-0.25,
        logit_bias=((3, 2.0), (7, -100.0)),
        allowed_token_ids=(1, 2, 3, 7),
        bad_token_ids=(2, *tiny_tokenizer().encode("A")),
        bad_token_sequences=tuple(
            tuple(tiny_tokenizer().encode(text)) for text in (" A", "BC", " BC")
        ),
        min_tokens=3,
        num_prompt_logprobs=2,
    )


async def test_a_cache_salt_and_a_kv_quality_reach_the_core(client, frontend):
    salted = {"cache_salt": "mine alone", "kv_quality": "low"}
    await client.completions.create(model=MODEL, prompt=["x", "y"], extra_body=salted)
    await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "x"}], extra_body=salted
    )
    await client.completions.create(model=MODEL, prompt="x", extra_body={"cache_salt": None})
    assert [spec.cache_salt for spec in frontend.specs] == ["mine alone"] * 3 + [""]
    assert [spec.kv_quality for spec in frontend.specs] == ["low"] * 3 + [""]


# --- echo and the prompt's log-probabilities


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_puts_the_prompt_before_each_choice(client, stream):
    answer = await client.completions.create(
        model=MODEL, prompt=["def", "x"], n=2, echo=True, stream=stream
    )
    texts = dict.fromkeys(range(4), "")
    if stream:
        async for chunk in answer:
            for choice in chunk.choices:
                assert choice.logprobs is None
                texts[choice.index] += choice.text
    else:
        texts = {choice.index: choice.text for choice in answer.choices}
        assert answer.usage.prompt_tokens == 4
    assert list(texts.values()) == ["defabc", "defabc", "xabc", "xabc"]


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_logprobs_scores_the_prompt(stream):
    frontend = ScriptedFrontend(Script(choices=(tokens("h\u00e9", "b", first_id=300, top=1),)))
    async with serving_http(frontend) as base_url, openai_client(base_url) as client:
        answer = await client.completions.create(
            model=MODEL, prompt="d\u00e9f", logprobs=1, echo=True, stream=stream
        )
        found = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if stream:
            async for chunk in answer:
                for name, values in found.items():
                    values += getattr(chunk.choices[0].logprobs, name)
        else:
            found = answer.choices[0].logprobs.model_dump()
    assert frontend.specs[0].sampling.num_prompt_logprobs == 1
    assert found["tokens"][0] == "d"
    assert found["token_logprobs"] == [None, *[-0.5] * 5]
    assert found["top_logprobs"][0] is None
    assert [len(top) for top in found["top_logprobs"][1:]] == [1] * 5
    # The two bytes of one character share its offset: the second one brings the character.
    assert found["text_offset"] == [0, 1, 1, 2, 3, 5]


async def test_no_tokens_asked_beside_echo_gives_the_prompt_alone(http):
    body = {"prompt": "def", "echo": True, "logprobs": 0, "max_tokens": 0}
    answer = (await http.post("/v1/completions", json=body)).json()
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("def", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("chat", [False, True])
async def test_prompt_logprobs_are_named_by_token_id(http, chat):
    body = {"prompt": "de"} if not chat else {"messages": HELLO}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    answer = (await http.post(path, json=body | {"prompt_logprobs": 2})).json()
    where = answer if chat else answer["choices"][0]
    first, second, *_ = where["prompt_logprobs"]
    text = "user: hello" if chat else "de"
    (token_id,) = tiny_tokenizer().encode(text[1])
    assert first is None
    assert second[str(token_id)] == {"logprob": -0.5, "rank": 1, "decoded_token": text[1]}
    assert second[str(token_id + 1)]["rank"] == 2
    without = (await http.post(path, json=body)).json()
    assert "prompt_logprobs" not in without
    assert "prompt_logprobs" not in without["choices"][0]


async def test_requests_of_load_clients_are_understood(http, frontend):
    """Fields that vllm bench, sglang bench, guidellm and aiperf send."""
    body = {
        "model": MODEL,
        "prompt": "x",
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "best_of": 1,
        "logprobs": None,
        "stop": None,
        "ignore_eos": True,
        "min_tokens": 8,
        "max_tokens": 8,
        "max_completion_tokens": 8,
        "frequency_penalty": 0,
        "logit_bias": {},
        "user": "someone",
        "a_field_of_tomorrow": {"a": 1},
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    assert frontend.specs[0].sampling.ignore_eos
