"""Bad input over HTTP: a clear error each time, and a good request works right after."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from router import limits
from tests.support.http_serving import plain_client, serving_http
from tests.support.scripted_frontend import Script, ScriptedFrontend, tokens

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def server():
    frontend = ScriptedFrontend()
    async with serving_http(frontend) as base_url, plain_client(base_url) as http:
        yield frontend, http


async def assert_still_serves(frontend, http):
    count = len(frontend.specs)
    response = await http.post(COMPLETIONS, json={"prompt": "x"})
    assert response.status_code == 200
    assert len(frontend.specs) == count + 1
    assert not frontend.running


def completion(**fields):
    return COMPLETIONS, {"prompt": "x", **fields}


def chat(**fields):
    return CHAT, {"messages": HELLO, **fields}


NAMED = {
    "prompt over max_model_len": (completion(prompt="x" * 256), "prompt", "256 tokens"),
    "prompt far over it": (completion(prompt="x" * 50_000), "prompt", "50000 characters"),
    "prompt with max_tokens over it": (
        completion(prompt="x" * 250, max_tokens=7),
        "max_tokens",
        "257 together",
    ),
    "chat over max_model_len": (
        chat(messages=[{"role": "user", "content": "x" * 256}]),
        "messages",
        "tokens",
    ),
    "empty prompt": (completion(prompt=""), "prompt", "is empty"),
    "no prompt": ((COMPLETIONS, {}), "prompt", "missing"),
    "null prompt": (completion(prompt=None), "prompt", "missing"),
    "empty list of ids": (completion(prompt=[]), "prompt", "is empty"),
    "one empty prompt of two": (completion(prompt=["a", ""]), "prompt", "is empty"),
    "no messages": ((CHAT, {}), "messages", "missing"),
    "empty messages": (chat(messages=[]), "messages", "0 entries"),
    "message without content": (
        chat(messages=[{"role": "assistant"}]),
        "messages[0].content",
        "missing",
    ),
    "image part": (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        "messages[0].content",
        "'image_url'",
    ),
    "unknown model": (completion(model="gpt-9"), "model", "'gpt-9' is not served"),
    "negative temperature": (completion(temperature=-0.1), "temperature", "-0.1"),
    "temperature of wrong type": (completion(temperature="hot"), "temperature", "got `str`"),
    "top_p 0": (completion(top_p=0), "top_p", "0.0"),
    "top_p above 1": (completion(top_p=1.01), "top_p", "1.01"),
    "top_k below -1": (completion(top_k=-2), "top_k", "-2"),
    "n over the cap": (completion(n=17), "n", "17"),
    "n 0": (completion(n=0), "n", "0"),
    "n true": (completion(n=True), "n", "got `bool`"),
    "n huge": (completion(n=10**30), "n", "10000"),
    "max_tokens 0": (completion(max_tokens=0), "max_tokens", "0"),
    "max_tokens negative": (completion(max_tokens=-5), "max_tokens", "-5"),
    "max_tokens huge": (completion(max_tokens=10**400), "max_tokens", "bits"),
    "seed negative": (completion(seed=-1), "seed", "-1"),
    "seed over 63 bits": (completion(seed=2**63), "seed", str(2**63)),
    "seed that n pushes over": (completion(seed=2**63 - 1, n=2), "seed", str(2**63 - 1)),
    "id over the vocabulary": (completion(prompt=[1, 512]), "prompt", "prompt[1] is 512"),
    "negative id": (completion(prompt=[-1]), "prompt", "prompt[0] is -1"),
    "stop id over the vocabulary": (completion(stop_token_ids=[600]), "stop_token_ids", "600"),
    "too many stop ids": (completion(stop_token_ids=[1] * 65), "stop_token_ids", "65"),
    "stop list over the cap": (completion(stop=["x"] * 17), "stop", "17 strings"),
    "stop string over the cap": (completion(stop=["x" * 257]), "stop", "stop[0]"),
    "empty stop string": (completion(stop=""), "stop", "stop[0] is ''"),
    "logprobs over the cap": (completion(logprobs=21), "logprobs", "21"),
    "top_logprobs over the cap": (chat(logprobs=True, top_logprobs=21), "logprobs", "21"),
    "top_logprobs alone": (chat(top_logprobs=2), "top_logprobs", "not true"),
    "priority over the cap": (completion(priority=1_001), "priority", "1001"),
    "empty cache_salt": (completion(cache_salt=""), "cache_salt", "0 characters"),
    "empty cache_salt of a chat": (chat(cache_salt=""), "cache_salt", "allowed: 1 to 256"),
    "cache_salt over the cap": (completion(cache_salt="s" * 257), "cache_salt", "257"),
    "cache_salt of wrong type": (completion(cache_salt=7), "cache_salt", "got `int`"),
    "unknown kv_quality": (
        completion(kv_quality="best"),
        "kv_quality",
        "'best'; allowed: exact, lossless, high, medium, low",
    ),
    "empty kv_quality of a chat": (chat(kv_quality=""), "kv_quality", "allowed: exact"),
    "timeout 0": (completion(timeout_s=0), "timeout_s", "0"),
    "timeout over the cap": (completion(timeout_s=1e9), "timeout_s", "1000000000.0"),
    "request id with a slash": (completion(request_id="a/b"), "request_id", "'a/b'"),
    "request id over the cap": (completion(request_id="a" * 129), "request_id", "aaa"),
    "role over the cap": (
        chat(messages=[{"role": "r" * 33, "content": "x"}]),
        "messages[0].role",
        "rrr",
    ),
    "too many messages": (
        chat(messages=[{"role": "user", "content": "x"}] * 1_025),
        "messages",
        "1025 entries",
    ),
    "too many prompts": (completion(prompt=["x"] * 65), "prompt", "65 entries"),
    "too many choices": (completion(prompt=["x"] * 9, n=8), "prompt", "72 choices"),
    "mixed prompts": (completion(prompt=["x", 1]), "prompt", "mixes"),
    "min_tokens over max_tokens": (completion(min_tokens=17), "min_tokens", "which is 16"),
    "min_tokens negative": (completion(min_tokens=-1), "min_tokens", "-1"),
    "nothing but ends allowed": (
        completion(min_tokens=2, allowed_token_ids=[0]),
        "min_tokens",
        "end the answer",
    ),
    "min_p above 1": (completion(min_p=1.5), "min_p", "1.5"),
    "repetition_penalty 0": (completion(repetition_penalty=0), "repetition_penalty", "0.0"),
    "presence_penalty over 2": (completion(presence_penalty=2.5), "presence_penalty", "2.5"),
    "frequency_penalty under -2": (
        completion(frequency_penalty=-3),
        "frequency_penalty",
        "-3.0; allowed: -2.0 to 2.0",
    ),
    "bias of a token outside": (completion(logit_bias={"512": 1}), "logit_bias", "token 512"),
    "bias over 100": (completion(logit_bias={"5": 101}), "logit_bias", "101"),
    "bias of a word": (completion(logit_bias={"five": 1}), "logit_bias", "wrong value"),
    "too many biases": (
        completion(logit_bias={str(i): 1 for i in range(1_025)}),
        "logit_bias",
        "1025 tokens",
    ),
    "allowed id outside": (
        completion(allowed_token_ids=[7, 512]),
        "allowed_token_ids",
        "allowed_token_ids[1] is 512",
    ),
    "all that is allowed is bad": (
        completion(allowed_token_ids=[7], bad_token_ids=[7]),
        "allowed_token_ids",
        "no token",
    ),
    "nothing left": (completion(bad_token_ids=list(range(512))), "bad_token_ids", "512"),
    "too many bad ids": (completion(bad_token_ids=[1] * 16_385), "bad_token_ids", "16385"),
    "empty bad word": (completion(bad_words=["a", ""]), "bad_words", "bad_words[1] is ''"),
    "too many bad words": (completion(bad_words=["a"] * 257), "bad_words", "257"),
    "bad word of too many tokens": (completion(bad_words=["a" * 200]), "bad_words", "200 tokens"),
    "prompt_logprobs over the cap": (completion(prompt_logprobs=21), "prompt_logprobs", "21"),
    "prompt_logprobs of a stream": (
        completion(prompt_logprobs=1, stream=True),
        "prompt_logprobs",
        "stream",
    ),
    "best_of beside n": (completion(best_of=2), "best_of", "2"),
    "echo in a chat": (chat(echo=True), "echo", "not supported"),
    "suffix": (completion(suffix="end"), "suffix", "'end'"),
    "tools": (chat(tools=[{"type": "function"}]), "tools", "not supported"),
    "response_format": (chat(response_format={"type": "xml"}), "response_format", "xml"),
    "client template": (chat(chat_template="{{ 1 }}"), "chat_template", "not supported"),
}


@pytest.mark.parametrize("name", NAMED)
async def test_the_error_names_field_and_value(server, name):
    frontend, http = server
    (path, body), param, words = NAMED[name]
    response = await http.post(path, content=json.dumps(body), headers=JSON)
    error = response.json()["error"]
    assert response.status_code == (404 if param == "model" else 400), error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert words in error["message"], error
    assert not error["retryable"]
    assert not frontend.specs
    await assert_still_serves(frontend, http)


JSON = {"content-type": "application/json"}
DEEP = b"[" * 65 + b"]" * 65

RAW = {
    "NaN temperature": (b'{"prompt": "x", "temperature": NaN}', "temperature is NaN"),
    "infinite temperature": (b'{"prompt": "x", "top_p": -Infinity}', "top_p is -Infinity"),
    "number out of range": (b'{"prompt": "x", "temperature": 1e999}', "out of range"),
    "invalid UTF-8": (b'{"prompt": "\xff\xfe"}', "not valid UTF-8: byte 12 is 0xff"),
    "half a character": (b'{"prompt": "\\ud800"}', "lone surrogate"),
    "half a character in a stop": (b'{"prompt": "x", "stop": "\\udc00"}', "lone surrogate"),
    "10,000 keys": (
        b"{" + b",".join(b'"k%d":1' % i for i in range(10_000)) + b"}",
        "10000 keys; allowed: at most 5000",
    ),
    "too deep": (b'{"prompt": %s}' % DEEP, "nested deeper than 64"),
    "too many lists": (b'{"user": [%s[]]}' % (b"[]," * 6_000), "lists and objects"),
    "100,000 brackets": (b"[" * 100_000, "lists and objects"),
    "truncated": (b'{"prompt": "x', "not JSON"),
    "empty": (b"", "not JSON"),
    "a list": (b"[]", "Expected `object`"),
    "not JSON at all": (b"prompt=x", "not JSON"),
    "an unterminated string of quotes": (b'"' + b'\\"' * 500_000, "not JSON"),
    "a number of 5,000 digits": (b'{"prompt": "x", "n": ' + b"9" * 5_000 + b"}", "out of range"),
}


@pytest.mark.parametrize("name", RAW)
async def test_broken_bodies(server, name):
    frontend, http = server
    body, words = RAW[name]
    for path in (COMPLETIONS, CHAT):
        response = await http.post(path, content=body, headers=JSON)
        assert response.status_code == 400, response.text
        if path == COMPLETIONS:
            assert words in response.json()["error"]["message"]
    assert not frontend.specs
    await assert_still_serves(frontend, http)


async def test_a_body_over_the_cap(server):
    frontend, http = server
    body = json.dumps({"prompt": "x" * limits.MAX_BODY_BYTES})
    response = await http.post(COMPLETIONS, content=body, headers=JSON)
    assert response.status_code == 413
    assert f"{len(body)} bytes; allowed: at most 1048576" in response.json()["error"]["message"]
    await assert_still_serves(frontend, http)


async def test_an_endless_body_is_cut_off(server):
    frontend, http = server
    num_sent = 0

    async def endless():
        nonlocal num_sent
        while num_sent < 256 * 2**20:
            num_sent += 2**20
            yield b"x" * 2**20

    try:
        response = await http.post(COMPLETIONS, content=endless(), headers=JSON)
    except httpx.TransportError:
        pass  # the server hung up while the client was still sending
    else:
        assert response.status_code == 413
    assert num_sent < 128 * 2**20
    await assert_still_serves(frontend, http)


async def test_a_body_at_the_cap_is_read(server):
    _, http = server
    body = json.dumps({"prompt": "x", "user": ""}).encode()
    body = body.replace(b'""', b'"' + b"u" * (limits.MAX_BODY_BYTES - len(body)) + b'"')
    assert len(body) == limits.MAX_BODY_BYTES
    response = await http.post(COMPLETIONS, content=body, headers=JSON)
    assert response.status_code == 200, response.text


async def test_a_body_that_does_not_come_is_not_waited_for(server, monkeypatch):
    frontend, http = server
    monkeypatch.setattr("router.http_body.BODY_TIMEOUT_S", 0.05)
    reader, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: 100\r\n\r\n{"
    )
    answer = await asyncio.wait_for(reader.read(), 10)  # to the end: the server hangs up
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"did not arrive within" in answer
    writer.close()
    await assert_still_serves(frontend, http)


async def test_only_json_is_taken(server):
    """A form or plain text needs no leave of the browser to cross origins; JSON does."""
    frontend, http = server
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = await http.post(
            COMPLETIONS, content=b'{"prompt": "x"}', headers={"content-type": content_type}
        )
        assert response.status_code == 415
        assert "allowed: application/json" in response.text
    assert not frontend.specs
    accepted = {"content-type": "Application/JSON; charset=utf-8"}
    response = await http.post(COMPLETIONS, content=b'{"prompt": "x"}', headers=accepted)
    assert response.status_code == 200


async def test_unknown_paths_and_methods(server):
    _, http = server
    missing = await http.get("/v1/embeddings")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "no_such_route")
    wrong = await http.get(COMPLETIONS)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


async def test_garbage_on_the_port_does_not_touch_a_running_stream():
    frontend = ScriptedFrontend(Script(choices=(tokens(*"abcdef"),), stall_after=3))
    async with serving_http(frontend) as base_url, plain_client(base_url) as http:
        async with http.stream("POST", COMPLETIONS, json={"prompt": "x", "stream": True}) as stream:
            lines = stream.aiter_lines()
            assert "a" in await anext(lines)
            host, port = base_url.removeprefix("http://").split(":")
            for garbage in (
                b"\x16\x03\x01\x02\x00" * 100,
                b"GET / HTTP/9.9\r\n\r\n",
                b"\x00" * 70_000,
            ):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(garbage)
                answer = await asyncio.wait_for(reader.read(100), 10)
                assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
                writer.close()
            rest = [await anext(lines) for _ in range(3)]
            assert any("b" in line for line in rest)
        await asyncio.wait_for(frontend.until(lambda f: f.closed), 10)


@pytest.mark.parametrize("role", ["user", "anything"])
async def test_neutral_values_of_unsupported_fields_are_accepted(server, role):
    frontend, http = server
    body = {
        "messages": [{"role": role, "content": "x", "name": "someone"}],
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "frequency_penalty": 0.0,
        "presence_penalty": None,
        "logit_bias": None,
        "logprobs": False,
        "top_logprobs": 0,
        "n": None,
        "stop": [],
        "stream": None,
        "stream_options": None,
        "seed": None,
        "metadata": {"a": "b"},
        "store": False,
    }
    response = await http.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    assert frontend.specs[0].sampling.num_logprobs == -1
