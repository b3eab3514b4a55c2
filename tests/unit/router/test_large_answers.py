"""Answers that are large by their log-probabilities: how many may be asked for, and where they
are written out."""

from __future__ import annotations

import threading
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.api.v1 import baton_pb2 as pb
from baton.api.v1 import baton_pb2_grpc
from baton.protocol.config import RouterConfig
from baton.protocol.errors import InvalidRequest
from baton.protocol.ids import RequestId
from baton.protocol.sampling import SamplingParams
from router import limits
from router.chat_template import ChatMessage
from router.frontend import GenerateSpec
from router.logprob_cap import check_together, tokens_that_fit
from router.raw_request import RawRequest
from router.tokenizer import Tokenizer
from router.validation import Validator
from tests.support.grpc_serving import serving
from tests.support.http_serving import plain_client, serving_http
from tests.support.scripted_frontend import MODEL, Script, ScriptedFrontend, tokens
from tests.support.tiny_text import tiny_template, tiny_tokenizer


def spec(num_prompt_tokens: int, n: int = 1, **sampling: int) -> GenerateSpec:
    return GenerateSpec(RequestId("r"), (1,) * num_prompt_tokens, SamplingParams(**sampling), n=n)


# --- how many


@pytest.mark.parametrize(
    ("specs", "num_entries", "param"),
    [
        ([spec(9, max_tokens=8, num_logprobs=1)], 16, "logprobs"),
        ([spec(9, num_prompt_logprobs=1)], 16, "prompt_logprobs"),
        ([spec(9, 2, max_tokens=4, num_logprobs=0, num_prompt_logprobs=0)], 24, "prompt_logprobs"),
        ([spec(3, 2, max_tokens=4, num_logprobs=2)] * 3, 72, "logprobs"),
        ([spec(3, num_prompt_logprobs=0), spec(5, num_prompt_logprobs=0)], 6, "prompt_logprobs"),
    ],
)
def test_prompts_choices_tokens_and_alternatives_count_together(
    specs: list[GenerateSpec], num_entries: int, param: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_LOGPROBS_PER_REQUEST", num_entries)
    check_together(specs)
    monkeypatch.setattr(limits, "MAX_LOGPROBS_PER_REQUEST", num_entries - 1)
    with pytest.raises(InvalidRequest, match=f"{num_entries} log-probabilities") as refused:
        check_together(specs)
    assert refused.value.param == param
    assert f"allowed: at most {num_entries - 1} in one request" in refused.value.message


def test_a_request_without_log_probabilities_has_no_cap() -> None:
    check_together([spec(200_000, 16, max_tokens=1_000_000)] * 64)
    assert tokens_that_fit(SamplingParams(), 16, 200_000) == 1_000_000


def test_a_refusal_names_every_factor() -> None:
    asked = {"max_tokens": 4_000, "num_logprobs": 20, "num_prompt_logprobs": 3}
    with pytest.raises(InvalidRequest) as refused:
        check_together([spec(100, 2, **asked)] * 2)
    for factor in ("n is 2", "prompt_logprobs 3 of 200", "logprobs 20 of max_tokens 4000", "2 pro"):
        assert factor in refused.value.message


@given(
    st.integers(1, 16),
    st.integers(-1, 20),
    st.integers(0, 20),
    st.integers(1, 400),
)
@settings(max_examples=100, deadline=None)
def test_the_default_length_is_the_longest_that_passes(
    n: int, prompt_top: int, top: int, num_prompt_tokens: int
) -> None:
    asked = {"num_logprobs": top, "num_prompt_logprobs": prompt_top}
    fit = tokens_that_fit(SamplingParams(**asked), n, num_prompt_tokens)
    check_together([spec(num_prompt_tokens, n, max_tokens=fit, **asked)])
    with pytest.raises(InvalidRequest):
        check_together([spec(num_prompt_tokens, n, max_tokens=fit + 1, **asked)])


def test_only_who_names_a_length_is_refused_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_LOGPROBS_PER_REQUEST", 60)
    validator = Validator(MODEL, tiny_tokenizer(), tiny_template(), RouterConfig())
    chat: dict[str, Any] = {"messages": [ChatMessage("user", "hi")], "logprobs": 2, "n": 2}
    assert validator.generate_spec(RawRequest(**chat)).sampling.max_tokens == 10
    with pytest.raises(InvalidRequest, match="logprobs 2 of max_tokens 11 each"):
        validator.generate_spec(RawRequest(**chat, max_tokens=11))


async def test_several_prompts_are_capped_as_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_LOGPROBS_PER_REQUEST", 40)
    frontend = ScriptedFrontend()
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 10, "logprobs": 0}
    async with serving_http(frontend) as url, plain_client(url) as client:
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        answer = await client.post("/v1/completions", json=body | {"prompt": ["a", "b", "c"]})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "logprobs"
        assert len(frontend.specs) == 2, "of the second request nothing was begun"


# --- where


def note_threads(monkeypatch: pytest.MonkeyPatch, method: str) -> set[bool]:
    """Whether the tokenizer's ``method`` ran on the event loop's thread, and whether elsewhere."""
    seen: set[bool] = set()
    here = threading.current_thread()
    real = getattr(Tokenizer, method)

    def noting(*args: Any, **more: Any) -> str:
        seen.add(threading.current_thread() is here)
        return str(real(*args, **more))

    monkeypatch.setattr(Tokenizer, method, noting)
    return seen


SCRIPT = Script(choices=(tokens(*"abcd", first_id=97, top=2),), tokens_per_output=4)
"""Twelve log-probabilities at once."""
COMPLETION = {"prompt": "x", "max_tokens": 4, "logprobs": 2, "request_id": "r"}
CHAT = {
    "messages": [{"role": "user", "content": "x"}],
    "logprobs": True,
    "top_logprobs": 2,
    "request_id": "r",
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "num_logprobs"),
    [
        ("completions", COMPLETION, 12),
        ("completions", COMPLETION | {"prompt": "xyz", "echo": True}, 21),
        ("chat/completions", CHAT, 12),
    ],
)
async def test_large_pieces_of_an_http_answer_are_written_off_the_loop(
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: dict[str, object],
    num_logprobs: int,
    stream: bool,
) -> None:
    threads = note_threads(monkeypatch, "token_text")
    told = []
    async with serving_http(ScriptedFrontend(SCRIPT)) as url, plain_client(url) as client:
        for most, is_here in ((num_logprobs, True), (num_logprobs - 1, False)):
            monkeypatch.setattr(limits, "INLINE_LOGPROBS", most)
            threads.clear()
            answer = await client.post(f"/v1/{path}", json=body | {"stream": stream})
            assert answer.status_code == 200
            told.append([line for line in answer.text.split("\n") if "created" in line])
            assert threads == {is_here}
    assert told[0]
    assert [_without_time(line) for line in told[0]] == [_without_time(line) for line in told[1]]


async def test_large_grpc_responses_are_built_off_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = note_threads(monkeypatch, "decode")
    sampling = pb.SamplingParams(max_tokens=4, logprobs=2, prompt_logprobs=1)
    request = pb.GenerateRequest(text="xyz", sampling_params=sampling, request_id="r")
    told = []
    for most, is_here in ((18, True), (17, False)):
        monkeypatch.setattr(limits, "INLINE_LOGPROBS", most)
        threads.clear()
        async with (
            serving(ScriptedFrontend(SCRIPT)) as address,
            grpc.aio.insecure_channel(address) as channel,
        ):
            stub = baton_pb2_grpc.BatonStub(channel)
            told.append([response async for response in stub.Generate(request)])
        assert threads == {is_here}
    assert told[0] == told[1]
    assert len(told[0][0].tokens) == 4


def _without_time(line: str) -> str:
    head, _, rest = line.partition('"created":')
    return head + rest.lstrip("0123456789")
