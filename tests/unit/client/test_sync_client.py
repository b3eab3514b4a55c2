"""The blocking client against a real port, with a scripted front end behind it."""

from __future__ import annotations

import dataclasses
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

import baton
from baton.client import Health, Token, Usage
from baton.protocol.errors import (
    Cancelled,
    DeadlineExceeded,
    IncompatiblePeer,
    InvalidRequest,
    Overloaded,
    PeerError,
    PromptTooLong,
    RequestConflict,
    Unavailable,
    UnknownModel,
)
from tests.support.grpc_serving import ThreadedServer, serving_in_thread
from tests.support.scripted_frontend import Script, ScriptedFrontend, tokens


@contextmanager
def connected(
    frontend: ScriptedFrontend, **options
) -> Iterator[tuple[ThreadedServer, baton.Client]]:
    with serving_in_thread(frontend) as server, baton.Client(server.address, **options) as client:
        yield server, client


@pytest.fixture(scope="module")
def plain() -> Iterator[ThreadedServer]:
    with serving_in_thread(ScriptedFrontend(Script(choices=(tokens("a", "b", "c", top=1),)))) as s:
        yield s


@pytest.fixture
def client(plain) -> Iterator[baton.Client]:
    with baton.Client(plain.address) as client:
        yield client


def test_generate_returns_the_whole_completion(client):
    completion = client.generate("hello", request_id="r")
    assert (completion.text, completion.request_id) == ("abc", "r")
    assert completion.finish_reason == "length"
    assert completion.usage == Usage(prompt_tokens=5, completion_tokens=3)
    assert completion.usage.total_tokens == 8
    (choice,) = completion.choices
    assert [token.token_id for token in choice.tokens] == [100, 101, 102]
    assert choice.tokens[0].logprobs.top[0].logprob == -0.5
    assert choice.timeline.ttft_ms == 5.0
    assert [span.name for span in choice.timeline.spans] == ["queued", "prefill"]
    assert choice.timeline.spans[1].attributes == {"tokens": 3, "hit_share": 0.5}


def test_every_option_reaches_the_core(client, plain):
    client.generate(
        [1, 2, 3],
        max_tokens=7,
        temperature=0,
        top_p=0.5,
        top_k=3,
        seed=11,
        n=2,
        stop="END",
        stop_token_ids=(5,),
        logprobs=0,
        ignore_eos=True,
        skip_special_tokens=False,
        priority=-4,
        cache_salt="mine alone",
        kv_quality="exact",
        request_id="mine",
        model="scripted",
        timeout=12.0,
    )
    spec = plain.frontend.specs[-1]
    assert (spec.request_id, spec.prompt_ids, spec.n) == ("mine", (1, 2, 3), 2)
    assert (spec.stop, spec.priority, spec.skip_special_tokens) == (("END",), -4, False)
    assert (spec.cache_salt, spec.kv_quality) == ("mine alone", "exact")
    assert 11 < spec.timeout_s <= 12.0
    sampling = spec.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (7, 0.0, 0.5)
    assert (sampling.top_k, sampling.seed, sampling.num_logprobs) == (3, 11, 0)
    assert (sampling.ignore_eos, sampling.stop_token_ids) == (True, (5,))


def test_absent_options_and_none_are_the_routers_choice(client, plain):
    client.generate("x", temperature=None, seed=None, stop=["A", "B"])
    spec = plain.frontend.specs[-1]
    assert (spec.sampling.temperature, spec.timeout_s) == (1.0, 30.0)
    assert spec.stop == ("A", "B")


def test_an_unknown_option_names_the_known_ones(client):
    with pytest.raises(TypeError, match=r"unknown option 'max_token'; known: .*max_tokens"):
        client.generate("x", max_token=3)


def test_choices_come_back_in_order(client):
    completion = client.generate("x", n=3)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert completion.usage.completion_tokens == 9


def test_a_stream_yields_chunks_and_keeps_the_sum(client):
    with client.stream("hello") as stream:
        first = next(stream)
        assert first.tokens[0] == Token(100, "a", first.tokens[0].logprobs)
        rest = list(stream)
        assert first.text + "".join(chunk.text for chunk in rest) == "abc"
        assert [chunk.seq for chunk in (first, *rest)] == [0, 1, 2]
        assert stream.completion().text == "abc"
        assert list(stream) == []


def test_chat_and_tokenize_agree(client, plain):
    messages = [baton.ChatMessage(role="user", content="hi")]
    client.chat(messages, max_tokens=4)
    ids = client.tokenize(messages)
    assert tuple(ids) == plain.frontend.specs[-1].prompt_ids
    assert client.detokenize(ids) == "user: hi\nassistant:"
    with client.chat_stream(messages) as stream:
        assert "".join(chunk.text for chunk in stream) == "abc"


def test_model_loads_and_health(client, plain):
    assert client.model_info().max_model_len == 256
    assert client.loads().workers[0].kv_bytes_received == 2**40
    assert client.health() is Health.SERVING
    plain.frontend.not_ready = "no decode worker"
    assert client.health() is Health.NOT_SERVING
    plain.frontend.not_ready = None


def test_loads_carry_every_field(client, plain):
    got, sent = client.loads(), plain.frontend.current_loads
    assert (got.num_queued, got.num_running) == (sent.num_queued, sent.num_running)
    for name in type(sent.workers[0]).__dataclass_fields__:
        if name != "kv_links":
            assert getattr(got.workers[0], name) == getattr(sent.workers[0], name), name
    links = [dataclasses.astuple(link) for link in got.workers[0].kv_links]
    assert links == [msgspec.structs.astuple(x) for x in sent.workers[0].kv_links] != []


# --- errors


def test_refusals_name_the_field_and_the_hop(client):
    with pytest.raises(InvalidRequest, match="temperature is -1") as caught:
        client.generate("x", temperature=-1)
    assert (caught.value.param, caught.value.hop) == ("temperature", "router")
    assert not caught.value.retryable
    with pytest.raises(UnknownModel):
        client.generate("x", model="other")
    with pytest.raises(PromptTooLong):
        client.generate([1] * 256)
    with pytest.raises(InvalidRequest):
        client.chat([])


@pytest.mark.parametrize(
    ("options", "param"),
    [({"max_tokens": 2**40}, "max_tokens"), ({"stop": "\ud800"}, "stop")],
)
def test_what_cannot_be_sent_is_an_invalid_request(client, options, param):
    with pytest.raises(InvalidRequest) as caught:
        client.generate("x", **options)
    assert (caught.value.param, caught.value.hop) == (param, "client")


def test_a_prompt_that_is_not_text_is_refused_before_it_is_sent(client):
    with pytest.raises(InvalidRequest, match="prompt"):
        client.generate("\ud800")
    with pytest.raises(InvalidRequest, match="messages"):
        client.chat([{"role": "user", "content": "x", "name": "y"}])


def test_a_message_over_the_cap_says_so(client):
    with pytest.raises(InvalidRequest, match="size cap") as caught:
        client.generate("x" * (5 * 2**20))
    assert not caught.value.retryable


def test_nobody_at_the_address_says_what_to_do():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with baton.Client(f"127.0.0.1:{port}", max_retries=1) as client:
        for call in (client.model_info, lambda: client.generate("x"), client.health):
            with pytest.raises(Unavailable, match="Is `baton serve` running") as caught:
                call()
            assert f"127.0.0.1:{port}" in str(caught.value)
            assert (caught.value.hop, caught.value.retryable) == ("client", True)


def test_another_service_at_the_address_is_not_a_baton(plain):
    with baton.Client(plain.address) as client:
        client._stub = type(
            "Other", (), {"GetLoads": client._channel.unary_unary("/x.Y/GetLoads", bytes)}
        )
        with pytest.raises(IncompatiblePeer, match="does not offer GetLoads"):
            client._call("GetLoads", client._stub.GetLoads, b"", None, max_retries=0)


def test_a_failure_in_the_middle_keeps_hop_and_retryable_and_is_not_retried():
    script = Script(error=PeerError("cut", hop="d-0", retryable=True), error_after=2)
    with connected(ScriptedFrontend(script)) as (server, client), client.stream("x") as stream:
        assert next(stream).text + next(stream).text == "ab"
        for _ in range(2):
            with pytest.raises(PeerError) as caught:
                next(stream)
            assert (caught.value.hop, caught.value.retryable) == ("d-0", True)
        with pytest.raises(PeerError):
            stream.completion()
    assert len(server.frontend.specs) == 1


def test_generate_never_returns_half_an_answer():
    script = Script(error=Overloaded("shed", hop="router"), error_after=2)
    with connected(ScriptedFrontend(script)) as (_, client), pytest.raises(Overloaded):
        client.generate("x")


# --- retries


def failing_first(num_failures, error):
    tries = []

    def script(spec):
        tries.append(spec)
        return Script(error=error) if len(tries) <= num_failures else Script()

    return ScriptedFrontend(script)


def test_a_call_without_output_is_tried_again_with_the_same_id():
    frontend = failing_first(2, Unavailable("no worker", hop="router"))
    with connected(frontend, max_retries=2) as (_, client):
        assert client.generate("x").text == "abc"
    assert len(frontend.specs) == 3
    assert len({spec.request_id for spec in frontend.specs}) == 1


def test_retries_are_bounded():
    frontend = failing_first(9, Overloaded("full", hop="router"))
    with connected(frontend, max_retries=1) as (_, client):
        with pytest.raises(Overloaded):
            client.generate("x")
        assert len(frontend.specs) == 2


def test_what_cannot_succeed_is_not_tried_again():
    frontend = failing_first(9, PeerError("no", hop="p-0", retryable=False))
    with connected(frontend) as (_, client):
        with pytest.raises(PeerError):
            client.generate("x")
        assert len(frontend.specs) == 1


def test_a_conflict_with_another_call_is_an_error():
    frontend = ScriptedFrontend(Script(stall_after=1))
    with connected(frontend) as (_, client), client.stream("x", request_id="r") as stream:
        next(stream)
        with pytest.raises(RequestConflict) as caught:
            client.generate("x", request_id="r")
        assert caught.value.request_id == "r"


# --- ends


def test_leaving_the_block_cancels_in_the_core():
    with connected(ScriptedFrontend(Script(stall_after=1))) as (server, client):
        with client.stream("x", request_id="r") as stream:
            next(stream)
        server.until(lambda fe: fe.closed == ["r"])
        with pytest.raises(Cancelled):
            next(stream)
        with pytest.raises(Cancelled):
            stream.completion()


def test_cancel_from_another_thread_wakes_the_reader():
    with connected(ScriptedFrontend(Script(stall_after=1))) as (server, client):
        stream = client.stream("x", request_id="r")
        next(stream)
        caught: list[BaseException] = []

        def read() -> None:
            try:
                next(stream)
            except Cancelled as exc:
                caught.append(exc)

        reader = threading.Thread(target=read)
        reader.start()
        stream.cancel()
        reader.join(10)
        assert len(caught) == 1
        server.until(lambda fe: fe.closed == ["r"])


def test_abandoning_a_stream_without_closing_it_cancels_in_the_core():
    with connected(ScriptedFrontend(Script(stall_after=1))) as (server, client):
        for _chunk in client.stream("x", request_id="r"):
            break
        server.until(lambda fe: fe.closed == ["r"])


def test_an_exception_in_generate_cancels_too(monkeypatch):
    with connected(ScriptedFrontend(Script(stall_after=1))) as (server, client):
        real = baton.Stream.completion

        def interrupted(stream):
            next(stream)
            raise KeyboardInterrupt

        monkeypatch.setattr(baton.Stream, "completion", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.generate("x", request_id="r")
        monkeypatch.setattr(baton.Stream, "completion", real)
        server.until(lambda fe: fe.closed == ["r"])


def test_abort_by_id_ends_the_stream():
    with connected(ScriptedFrontend(Script(stall_after=1))) as (_, client):
        stream = client.stream("x", request_id="r")
        next(stream)
        assert client.abort("r")
        with pytest.raises(Cancelled) as caught:
            next(stream)
        assert caught.value.hop == "router"
        assert not client.abort("r")


def test_closing_the_client_cancels_its_streams():
    with serving_in_thread(ScriptedFrontend(Script(stall_after=1))) as server:
        client = baton.Client(server.address)
        stream = client.stream("x", request_id="r")
        next(stream)
        client.close()
        client.close()
        server.until(lambda fe: fe.closed == ["r"])
        with pytest.raises(Cancelled):
            next(stream)
        with pytest.raises(RuntimeError, match="closed"):
            client.generate("x")


def test_a_timeout_is_the_routers_answer_where_it_can_be():
    with connected(ScriptedFrontend(Script(stall_after=1)), timeout=0.2) as (server, client):
        with pytest.raises(DeadlineExceeded) as caught:
            client.generate("x")
        assert caught.value.hop == "router"
        server.until(lambda fe: not fe.running)


def test_a_server_that_says_nothing_is_a_timeout_of_the_client():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with baton.Client(address, timeout=0.2, max_retries=0) as client:
            with pytest.raises(DeadlineExceeded, match=r"timeout=0\.2") as caught:
                client.model_info()
            assert (caught.value.hop, caught.value.retryable) == ("client", False)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_that_is_none_is_refused(client, timeout):
    with pytest.raises(InvalidRequest, match="timeout"):
        client.generate("x", timeout=timeout)
    with pytest.raises(InvalidRequest, match="timeout"):
        client.loads(timeout=timeout)
    with pytest.raises(InvalidRequest, match="timeout"):
        baton.Client(timeout=timeout)


def test_threads_share_a_client(client):
    texts: list[str] = []

    def work() -> None:
        texts.extend(client.generate("x").text for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert texts == ["abc"] * 40
