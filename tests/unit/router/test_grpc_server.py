"""The gRPC port as a client without our SDK sees it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from collections.abc import AsyncIterator

import grpc
import msgspec
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.api.v1 import baton_pb2 as pb
from baton.api.v1 import baton_pb2_grpc
from baton.protocol.errors import ConfigError, InternalError, Overloaded, PeerError, Unavailable
from baton.protocol.messages import KvLink
from router.grpc_server import MAX_MESSAGE_BYTES
from tests.support.grpc_serving import new_server, serving, with_port
from tests.support.relay import hang_up, relay_to
from tests.support.scripted_frontend import MODEL, Script, ScriptedFrontend, tokens

LONG = Script(choices=(tokens(*"x" * 50_000),), tokens_per_output=1)


@pytest.fixture
def frontend():
    return ScriptedFrontend()


@pytest.fixture
async def channel(frontend) -> AsyncIterator[grpc.aio.Channel]:
    async with serving(frontend) as address, grpc.aio.insecure_channel(address) as channel:
        yield channel


@pytest.fixture
def stub(channel):
    return baton_pb2_grpc.BatonStub(channel)


async def collected(call, into: list | None = None) -> list[pb.GenerateResponse]:
    responses = [] if into is None else into
    async for response in call:
        responses.append(response)
    return responses


def request(text="hello", **fields) -> pb.GenerateRequest:
    sampling = {
        k: fields.pop(k) for k in list(fields) if k in pb.SamplingParams().DESCRIPTOR.fields_by_name
    }
    return pb.GenerateRequest(text=text, sampling_params=pb.SamplingParams(**sampling), **fields)


def detail(error: grpc.aio.AioRpcError) -> pb.ErrorDetail:
    (value,) = [v for k, v in error.trailing_metadata() if k == "baton-error-bin"]
    return pb.ErrorDetail.FromString(value)


async def failure(awaitable) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return caught.value


# --- what a request becomes


async def test_a_request_reaches_the_core_as_it_was_written(stub, frontend):
    await collected(
        stub.Generate(
            pb.GenerateRequest(
                request_id="mine",
                token_ids=pb.TokenIds(ids=[1, 2, 3]),
                sampling_params=pb.SamplingParams(
                    max_tokens=7,
                    temperature=0.0,
                    top_p=0.5,
                    top_k=3,
                    seed=11,
                    n=2,
                    stop=["END"],
                    stop_token_ids=[5],
                    logprobs=0,
                    ignore_eos=True,
                    skip_special_tokens=False,
                ),
                priority=-4,
                timeout_s=12.5,
                cache_salt="mine alone",
                kv_quality="high",
            )
        )
    )
    (spec,) = frontend.specs
    assert (spec.request_id, spec.prompt_ids, spec.n) == ("mine", (1, 2, 3), 2)
    assert (spec.stop, spec.priority, spec.timeout_s) == (("END",), -4, 12.5)
    assert (spec.skip_special_tokens, spec.cache_salt) == (False, "mine alone")
    assert spec.kv_quality == "high"
    sampling = spec.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (7, 0.0, 0.5)
    assert (sampling.top_k, sampling.seed, sampling.num_logprobs) == (3, 11, 0)
    assert (sampling.ignore_eos, sampling.stop_token_ids) == (True, (5,))


async def test_the_rules_of_a_draw_reach_the_core(stub, frontend):
    rules = {
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 0.5,
        "logit_bias": {9: -2.5},
        "allowed_token_ids": [4, 9],
        "bad_token_ids": [4],
        "bad_words": ["ab"],
        "min_tokens": 2,
        "prompt_logprobs": 0,
    }
    await collected(stub.Generate(request("hello", seed=1, **rules)))
    sampling = frontend.specs[0].sampling
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1.0, 0.5)
    assert (sampling.logit_bias, sampling.allowed_token_ids) == (((9, -2.5),), (4, 9))
    assert (sampling.bad_token_ids, len(sampling.bad_token_sequences)) == ((4,), 2)
    assert (sampling.min_tokens, sampling.num_prompt_logprobs) == (2, 0)


async def test_the_prompt_comes_back_with_the_first_response(stub):
    first, *others = await collected(stub.Generate(request("hey", prompt_logprobs=1)))
    assert [t.text for t in first.prompt_tokens] == ["h", "e", "y"]
    assert [t.HasField("logprobs") for t in first.prompt_tokens] == [False, True, True]
    assert len(first.prompt_tokens[1].logprobs.top) == 1
    assert not any(response.prompt_tokens for response in others)


async def test_absent_fields_get_the_defaults(stub, frontend):
    await collected(stub.Generate(request("hello")))
    (spec,) = frontend.specs
    assert spec.request_id
    assert spec.timeout_s == 30.0
    assert spec.sampling.temperature == 1.0
    assert (spec.sampling.max_tokens, spec.sampling.num_logprobs) == (16, -1)
    assert spec.skip_special_tokens is True
    assert spec.cache_salt == ""


async def test_an_empty_salt_is_not_the_same_as_none(stub):
    error = await failure(collected(stub.Generate(request("hello", cache_salt=""))))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert detail(error).param == "cache_salt"


async def test_chat_goes_through_the_template(stub, frontend):
    messages = [pb.ChatMessage(role="user", content="hi")]
    await collected(stub.Chat(pb.ChatRequest(messages=messages, cache_salt="s")))
    assert frontend.specs[0].cache_salt == "s"
    answer = await stub.Detokenize(pb.DetokenizeRequest(token_ids=frontend.specs[0].prompt_ids))
    assert answer.text == "user: hi\nassistant:"


# --- what comes back


async def test_outputs_come_back_batched_and_numbered():
    script = Script(
        choices=(tokens("a", "b", "c", top=1),),
        tokens_per_output=2,
        finish_reason="stop",
        stop_reason="c",
    )
    async with (
        serving(ScriptedFrontend(script)) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub = baton_pb2_grpc.BatonStub(channel)
        first, last = await collected(stub.Generate(request("hello", request_id="r")))
    assert (first.request_id, first.index, first.seq, first.text) == ("r", 0, 0, "ab")
    assert [t.token_id for t in first.tokens] == [100, 101]
    assert first.tokens[0].logprobs.logprob == -0.5
    assert first.tokens[0].logprobs.top[0].token_id == 100
    assert first.tokens[0].logprobs.top[0].text
    assert first.finish_reason == pb.FINISH_REASON_UNSPECIFIED
    assert not first.HasField("timeline")
    assert (last.seq, last.usage.prompt_tokens, last.usage.completion_tokens) == (2, 5, 3)
    assert (last.finish_reason, last.stop_string) == (pb.FINISH_REASON_STOP, "c")
    assert [span.name for span in last.timeline.spans] == ["queued", "prefill"]
    assert last.timeline.spans[1].attributes["tokens"].integer == 3
    assert last.timeline.spans[1].attributes["hit_share"].real == 0.5


async def test_a_stop_token_zero_differs_from_no_stop_reason():
    script = Script(finish_reason="stop", stop_reason=0)
    async with (
        serving(ScriptedFrontend(script)) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        *_, last = await collected(baton_pb2_grpc.BatonStub(channel).Generate(request()))
    assert last.WhichOneof("stop_reason") == "stop_token_id"


async def test_tokenize_is_what_generate_computes_on(stub, frontend):
    answer = await stub.Tokenize(pb.TokenizeRequest(text="héllo"))
    await collected(stub.Generate(request("héllo")))
    assert tuple(answer.token_ids) == frontend.specs[0].prompt_ids
    messages = [pb.ChatMessage(role="user", content="hi")]
    answer = await stub.Tokenize(pb.TokenizeRequest(messages=pb.ChatMessages(messages=messages)))
    await collected(stub.Chat(pb.ChatRequest(messages=messages)))
    assert tuple(answer.token_ids) == frontend.specs[1].prompt_ids
    assert not (await stub.Tokenize(pb.TokenizeRequest(text=""))).token_ids


async def test_detokenize_can_show_special_tokens(stub):
    ids = [*(await stub.Tokenize(pb.TokenizeRequest(text="ab"))).token_ids, 256]
    shown = pb.DetokenizeRequest(token_ids=ids, skip_special_tokens=False)
    assert (await stub.Detokenize(shown)).text == "ab<|end|>"
    assert (await stub.Detokenize(pb.DetokenizeRequest(token_ids=ids))).text == "ab"


@pytest.mark.parametrize("ids", [[512], [-1], [1] * 257])
async def test_detokenize_refuses_what_is_no_text_of_this_model(stub, ids):
    error = await failure(stub.Detokenize(pb.DetokenizeRequest(token_ids=ids)))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert detail(error).param == "token_ids"


async def test_model_and_loads_carry_every_field(stub, frontend):
    info = await stub.GetModelInfo(pb.GetModelInfoRequest())
    for name, value in _fields(MODEL):
        got = getattr(info, name)
        assert (tuple(got) if isinstance(value, tuple) else got) == value, name
    loads = await stub.GetLoads(pb.GetLoadsRequest())
    (worker,) = loads.workers
    for name, value in _fields(frontend.current_loads.workers[0]):
        got = getattr(worker, name)
        if name == "kv_links":
            got = [tuple(getattr(link, f) for f in KvLink.__struct_fields__) for link in got]
            value = tuple(msgspec.structs.astuple(link) for link in value)
        assert (tuple(got) if isinstance(value, tuple) else got) == value, name


def _fields(value) -> list[tuple[str, object]]:
    return [(name, getattr(value, name)) for name in type(value).__dataclass_fields__]


# --- errors


async def test_a_refused_request_names_the_field(stub):
    error = await failure(collected(stub.Generate(request(temperature=-1.0))))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "temperature is -1.0" in error.details()
    said = detail(error)
    assert (said.code, said.param, said.retryable) == ("invalid_request", "temperature", False)
    assert said.hop == "router"


async def test_an_unknown_model_is_not_found(stub):
    error = await failure(collected(stub.Generate(request(model="other"))))
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert detail(error).code == "model_not_found"


@pytest.mark.parametrize(
    ("raised", "status", "retryable"),
    [
        (Overloaded("1024 requests wait", hop="router"), "RESOURCE_EXHAUSTED", True),
        (Unavailable("no decode worker", hop="d-0"), "UNAVAILABLE", True),
        (PeerError("cut", hop="p-0", retryable=False), "UNAVAILABLE", False),
    ],
)
@pytest.mark.parametrize("after", [0, 2])
async def test_an_error_of_the_core_keeps_its_type_and_hop(raised, status, retryable, after):
    frontend = ScriptedFrontend(Script(error=raised, error_after=after))
    got = []
    async with serving(frontend) as address, grpc.aio.insecure_channel(address) as channel:
        call = baton_pb2_grpc.BatonStub(channel).Generate(request())
        error = await failure(collected(call, got))
    assert len(got) == after
    assert all(r.finish_reason == pb.FINISH_REASON_UNSPECIFIED for r in got)
    assert error.code().name == status
    said = detail(error)
    assert (said.code, said.hop, said.retryable) == (raised.code, raised.hop, retryable)


async def test_a_bug_is_logged_and_says_nothing_of_the_inside(caplog):
    frontend = ScriptedFrontend(Script(error=KeyError("secret/path"), error_after=1))
    async with serving(frontend) as address, grpc.aio.insecure_channel(address) as channel:
        error = await failure(collected(baton_pb2_grpc.BatonStub(channel).Generate(request())))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in error.details() + str(detail(error))
    assert detail(error).code == InternalError.code
    assert "secret/path" in caplog.text


async def test_a_giant_error_message_still_arrives():
    frontend = ScriptedFrontend(Script(error=Overloaded("\N{SNOWMAN}" * 50_000, hop="p-0")))
    async with serving(frontend) as address, grpc.aio.insecure_channel(address) as channel:
        error = await failure(collected(baton_pb2_grpc.BatonStub(channel).Generate(request())))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert detail(error).message.startswith("\N{SNOWMAN}")


async def test_a_message_over_the_cap_is_refused_and_the_next_one_served(stub, frontend):
    big = request("x" * (MAX_MESSAGE_BYTES + 1))
    for compression in (None, grpc.Compression.Gzip):
        error = await failure(collected(stub.Generate(big, compression=compression)))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not frontend.specs
    assert len(await collected(stub.Generate(request()))) == 3


# --- ends that the client chooses


async def test_a_cancelled_call_closes_the_request_in_the_core():
    frontend = ScriptedFrontend(Script(stall_after=2))
    async with serving(frontend) as address, grpc.aio.insecure_channel(address) as channel:
        call = baton_pb2_grpc.BatonStub(channel).Generate(request(request_id="r"))
        await call.read()
        assert frontend.running == {"r"}
        call.cancel()
        async with asyncio.timeout(10):
            await frontend.until(lambda fe: fe.closed == ["r"])


async def test_a_lost_connection_closes_the_request_in_the_core():
    frontend = ScriptedFrontend(Script(stall_after=1))
    async with (
        serving(frontend) as address,
        relay_to(address) as relay,
        grpc.aio.insecure_channel(relay.address) as channel,
    ):
        call = baton_pb2_grpc.BatonStub(channel).Generate(request(request_id="r"))
        await call.read()
        relay.cut()
        async with asyncio.timeout(10):
            await frontend.until(lambda fe: fe.closed == ["r"])
        error = await failure(call.read())
        assert error.code() == grpc.StatusCode.UNAVAILABLE


async def test_abort_by_id_ends_the_stream_of_another_caller():
    frontend = ScriptedFrontend(Script(stall_after=1))
    async with serving(frontend) as address, grpc.aio.insecure_channel(address) as channel:
        stub = baton_pb2_grpc.BatonStub(channel)
        call = stub.Generate(request(request_id="r"))
        await call.read()
        assert (await stub.Abort(pb.AbortRequest(request_id="r"))).aborted
        error = await failure(call.read())
        assert error.code() == grpc.StatusCode.CANCELLED
        assert detail(error).code == "cancelled"
        assert not (await stub.Abort(pb.AbortRequest(request_id="r"))).aborted
        error = await failure(stub.Abort(pb.AbortRequest()))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_the_sooner_of_the_two_deadlines_holds():
    frontend = ScriptedFrontend()
    async with serving(frontend) as address, grpc.aio.insecure_channel(address) as channel:
        stub = baton_pb2_grpc.BatonStub(channel)
        await collected(stub.Generate(request(timeout_s=5.0), timeout=20))
        await collected(stub.Generate(request(timeout_s=20.0), timeout=5))
        await collected(stub.Generate(request(), timeout=500))
    own, of_call, default = (spec.timeout_s for spec in frontend.specs)
    assert own == 5.0
    assert 0 < of_call < 10, "gRPC itself rounds deadlines up a little"
    assert default == 30.0


async def test_a_passed_deadline_of_the_request_is_the_routers_answer():
    frontend = ScriptedFrontend(Script(stall_after=1))
    async with serving(frontend) as address, grpc.aio.insecure_channel(address) as channel:
        stub = baton_pb2_grpc.BatonStub(channel)
        error = await failure(collected(stub.Generate(request(timeout_s=0.05))))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert detail(error).hop == "router"


async def test_a_passed_deadline_of_the_call_ends_the_request_too():
    frontend = ScriptedFrontend(Script(stall_after=1))
    async with serving(frontend) as address, grpc.aio.insecure_channel(address) as channel:
        stub = baton_pb2_grpc.BatonStub(channel)
        error = await failure(collected(stub.Generate(request(), timeout=0.3)))
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        async with asyncio.timeout(10):
            await frontend.until(lambda fe: len(fe.specs) == 1 and not fe.running)


async def test_a_slow_reader_holds_the_core_back_instead_of_filling_memory():
    frontend = ScriptedFrontend(LONG)
    async with serving(frontend) as address:
        options = [("grpc.http2.lookahead_bytes", 1_024), ("grpc.http2.bdp_probe", 0)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            stub = baton_pb2_grpc.BatonStub(channel)
            call = stub.Generate(request())
            await call.read()
            # Calls that are answered in between prove that the server had its turns.
            before = -1
            while frontend.num_outputs != before:
                before = frontend.num_outputs
                for _ in range(50):
                    await stub.GetModelInfo(pb.GetModelInfoRequest())
            assert frontend.num_outputs < 50_000 / 2
            call.cancel()


# --- the port


async def test_garbage_on_the_port_does_not_disturb_a_running_stream():
    frontend = ScriptedFrontend(LONG)
    garbage = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        bytes(range(256)) * 64,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4_096,
        b"",
    ]
    async with serving(frontend) as address, grpc.aio.insecure_channel(address) as channel:
        call = baton_pb2_grpc.BatonStub(channel).Generate(request())
        seqs = [(await call.read()).seq]
        for noise in garbage:
            reader, writer = await asyncio.open_connection(*address.split(":"))
            async with asyncio.timeout(30):
                with contextlib.suppress(OSError):  # a reset is a fine answer
                    writer.write(noise)
                    writer.write_eof()
                    await reader.read()
            await hang_up(writer)
            seqs += [(await call.read()).seq for _ in range(100)]
        assert frontend.running, "the stream must outlast the noise for this to show anything"
        assert seqs == list(range(len(seqs)))
        call.cancel()


async def test_bytes_that_are_no_message_are_refused(channel, frontend):
    method = channel.unary_stream("/baton.v1.Baton/Generate")
    error = await failure(collected(method(b"\xff" * 64)))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "baton.v1" in detail(error).message
    assert not frontend.specs
    error = await failure(channel.unary_unary("/baton.v1.Baton/Abort")(b"\xff"))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    error = await failure(channel.unary_unary("/baton.v1.Baton/Train")(b""))
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_connections_beyond_the_cap_are_closed():
    async with (
        serving(ScriptedFrontend(), max_connections=1) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub = baton_pb2_grpc.BatonStub(channel)
        await stub.GetModelInfo(pb.GetModelInfoRequest())
        reader, writer = await asyncio.open_connection(*address.split(":"))
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
        await hang_up(writer)
        await stub.GetModelInfo(pb.GetModelInfoRequest())


async def test_a_taken_port_is_a_config_error_that_names_it():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = new_server(ScriptedFrontend(), with_port(port))
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            await server.start()
        await server.stop(grace_s=0)


async def test_two_routers_cannot_share_a_port():
    async with serving(ScriptedFrontend()) as address:
        second = new_server(ScriptedFrontend(), with_port(int(address.split(":")[1])))
        with pytest.raises(ConfigError, match="grpc_port"):
            await second.start()


async def test_stop_lets_a_running_stream_end_within_the_grace():
    frontend = ScriptedFrontend(Script(choices=(tokens(*"x" * 2_000),)))
    server = new_server(frontend)
    address = f"127.0.0.1:{await server.start()}"
    async with grpc.aio.insecure_channel(address) as channel:
        call = baton_pb2_grpc.BatonStub(channel).Generate(request())
        await call.read()
        async with asyncio.TaskGroup() as group:
            group.create_task(server.stop(grace_s=60))
            rest = await collected_by_reads(call)
    assert len(rest) == 2_000 - 1
    assert rest[-1].finish_reason == pb.FINISH_REASON_LENGTH


async def collected_by_reads(call) -> list[pb.GenerateResponse]:
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


async def test_stop_without_grace_aborts_what_runs():
    frontend = ScriptedFrontend(Script(stall_after=1))
    server = new_server(frontend)
    address = f"127.0.0.1:{await server.start()}"
    async with grpc.aio.insecure_channel(address) as channel:
        call = baton_pb2_grpc.BatonStub(channel).Generate(request(request_id="r"))
        await call.read()
        await server.stop(grace_s=0)
        await server.stop(grace_s=0)
        async with asyncio.timeout(10):
            await frontend.until(lambda fe: fe.closed == ["r"])
        await failure(call.read())


# --- health and reflection


async def test_health_follows_the_front_end(channel, frontend):
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", "baton.v1.Baton"):
        ask = health_pb2.HealthCheckRequest(service=service)
        frontend.not_ready = None
        assert (await stub.Check(ask)).status == health_pb2.HealthCheckResponse.SERVING
        frontend.not_ready = "no decode worker"
        assert (await stub.Check(ask)).status == health_pb2.HealthCheckResponse.NOT_SERVING
    error = await failure(stub.Check(health_pb2.HealthCheckRequest(service="other")))
    assert error.code() == grpc.StatusCode.NOT_FOUND


async def test_health_watch_tells_changes_and_the_end():
    frontend = ScriptedFrontend()
    server = new_server(frontend)
    address = f"127.0.0.1:{await server.start()}"
    answers = health_pb2.HealthCheckResponse
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == answers.SERVING
        frontend.not_ready = "no decode worker"
        assert (await watch.read()).status == answers.NOT_SERVING
        frontend.not_ready = None
        assert (await watch.read()).status == answers.SERVING
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="other"))
        assert (await unknown.read()).status == answers.SERVICE_UNKNOWN
        async with asyncio.TaskGroup() as group:
            group.create_task(server.stop(grace_s=30))
            assert (await watch.read()).status == answers.NOT_SERVING
            assert await watch.read() is grpc.aio.EOF


async def test_reflection_lists_and_describes_as_grpcurl_asks(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    questions = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="baton.v1.Baton"),
    ]
    listed, described = [a async for a in stub.ServerReflectionInfo(iter(questions))]
    names = {service.name for service in listed.list_services_response.service}
    assert names == {
        "baton.v1.Baton",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    files = described.file_descriptor_response.file_descriptor_proto
    (file,) = (descriptor_pb2.FileDescriptorProto.FromString(file) for file in files)
    assert [m.name for m in file.service[0].method][:2] == ["Generate", "Chat"]


async def test_a_thousand_streams_leave_nothing_behind(stub, frontend):
    for _ in range(20):
        await asyncio.gather(*(collected(stub.Generate(request())) for _ in range(50)))
    gc.collect()
    assert not frontend.running
    assert len(frontend.specs) == 1_000
    assert len({spec.request_id for spec in frontend.specs}) == 1_000
