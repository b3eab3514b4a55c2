"""The asyncio client against a real port, with a scripted front end behind it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

import baton
from baton.client import Health
from baton.protocol.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    PeerError,
    Unavailable,
)
from tests.support.grpc_serving import serving, with_port
from tests.support.relay import relay_to
from tests.support.scripted_frontend import Script, ScriptedFrontend, tokens


@asynccontextmanager
async def connected(frontend: ScriptedFrontend, **options) -> AsyncIterator[baton.AsyncClient]:
    async with serving(frontend) as address, baton.AsyncClient(address, **options) as client:
        yield client


async def until(frontend: ScriptedFrontend, condition) -> None:
    async with asyncio.timeout(10):
        await frontend.until(condition)


async def test_generate_and_stream_say_the_same():
    async with connected(ScriptedFrontend()) as client:
        completion = await client.generate("hello", max_tokens=3, n=2)
        assert [choice.text for choice in completion.choices] == ["abc", "abc"]
        async with client.stream("hello", max_tokens=3) as stream:
            texts = [chunk.text async for chunk in stream]
            assert (await stream.completion()).text == "".join(texts) == "abc"


async def test_the_small_calls():
    frontend = ScriptedFrontend()
    async with connected(frontend) as client:
        messages = [baton.ChatMessage(role="user", content="hi")]
        assert (await client.chat(messages)).text == "abc"
        ids = await client.tokenize(messages)
        assert tuple(ids) == frontend.specs[-1].prompt_ids
        assert await client.detokenize(ids) == "user: hi\nassistant:"
        assert (await client.model_info()).name == "scripted"
        assert (await client.loads()).workers[0].worker_id == "d-0"
        assert await client.health() is Health.SERVING
        frontend.not_ready = "no decode worker"
        assert await client.health() is Health.NOT_SERVING
        assert not await client.abort("nobody")
        async with client.chat_stream(messages) as stream:
            assert [chunk.text async for chunk in stream] == ["a", "b", "c"]


async def test_many_streams_at_once_on_one_connection():
    async with connected(ScriptedFrontend()) as client:
        done = await asyncio.gather(*(client.generate(f"{i}", max_tokens=3) for i in range(100)))
    assert {completion.text for completion in done} == {"abc"}
    assert len({completion.request_id for completion in done}) == 100


async def test_errors_are_typed():
    async with connected(ScriptedFrontend()) as client:
        with pytest.raises(InvalidRequest, match="top_p") as caught:
            await client.generate("x", top_p=0)
        assert (caught.value.param, caught.value.hop) == ("top_p", "router")
        with pytest.raises(InvalidRequest, match="timeout"):
            await client.loads(timeout=-1)


async def test_a_failure_in_the_middle_stays_one():
    script = Script(error=PeerError("cut", hop="d-0"), error_after=1)
    frontend = ScriptedFrontend(script)
    async with connected(frontend) as client, client.stream("x") as stream:
        assert (await anext(stream)).text == "a"
        for _ in range(2):
            with pytest.raises(PeerError) as caught:
                await anext(stream)
            assert caught.value.hop == "d-0"
    assert len(frontend.specs) == 1


async def test_a_call_without_output_is_tried_again_with_the_same_id():
    scripts = [Script(error=Unavailable("no worker", hop="router")), Script()]
    frontend = ScriptedFrontend(lambda spec: scripts[min(len(frontend.specs) - 1, 1)])
    async with connected(frontend) as client:
        assert (await client.generate("x")).text == "abc"
    assert len(frontend.specs) == 2
    assert len({spec.request_id for spec in frontend.specs}) == 1


async def test_a_router_that_comes_back_is_found_again():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with baton.AsyncClient(f"127.0.0.1:{port}", max_retries=8) as client:
        with pytest.raises(Unavailable, match="baton serve"):
            await client.health()
        async with serving(ScriptedFrontend(), with_port(port)):
            assert (await client.generate("x")).text == "abc"


async def test_leaving_the_block_cancels_in_the_core():
    frontend = ScriptedFrontend(Script(stall_after=1))
    async with connected(frontend) as client:
        async with client.stream("x", request_id="r") as stream:
            await anext(stream)
        await until(frontend, lambda fe: fe.closed == ["r"])
        with pytest.raises(Cancelled):
            await anext(stream)


async def test_cancelling_the_task_cancels_in_the_core():
    frontend = ScriptedFrontend(Script(stall_after=1))
    async with connected(frontend) as client:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(client.generate("x", request_id="r"))
            await until(frontend, lambda fe: fe.num_outputs == 1)
            task.cancel()
        assert task.cancelled()
        await until(frontend, lambda fe: fe.closed == ["r"])


async def test_cancel_from_another_task_wakes_the_reader_with_a_typed_error():
    frontend = ScriptedFrontend(Script(stall_after=1))
    async with connected(frontend) as client:
        stream = client.stream("x", request_id="r")
        await anext(stream)

        reader = asyncio.ensure_future(anext(stream))
        await client.health()
        stream.cancel()
        with pytest.raises(Cancelled):
            await reader
        await until(frontend, lambda fe: fe.closed == ["r"])


async def test_abandoning_a_stream_without_closing_it_cancels_in_the_core():
    frontend = ScriptedFrontend(Script(stall_after=1))
    async with connected(frontend) as client:
        async for _chunk in client.stream("x", request_id="r"):
            break
        await until(frontend, lambda fe: fe.closed == ["r"])


async def test_cancel_during_the_back_off_of_a_retry():
    frontend = ScriptedFrontend(Script(error=Unavailable("no worker", hop="router")))
    async with connected(frontend, max_retries=50) as client:
        stream = client.stream("x")

        reader = asyncio.ensure_future(anext(stream))
        await until(frontend, lambda fe: len(fe.specs) == 1)
        stream.cancel()
        with pytest.raises(Cancelled):
            await reader


async def test_a_timeout_is_the_routers_answer_where_it_can_be():
    frontend = ScriptedFrontend(Script(stall_after=1))
    async with connected(frontend, timeout=0.2) as client:
        with pytest.raises(DeadlineExceeded) as caught:
            await client.generate("x")
        assert caught.value.hop == "router"


async def test_a_cut_connection_in_the_middle_is_unavailable_and_not_repeated():
    frontend = ScriptedFrontend(Script(choices=(tokens("a", "b"),), stall_after=1))
    async with (
        serving(frontend) as address,
        relay_to(address) as relay,
        baton.AsyncClient(relay.address) as client,
        client.stream("x") as stream,
    ):
        assert (await anext(stream)).text == "a"
        relay.cut()
        with pytest.raises(Unavailable) as caught:
            await anext(stream)
        assert (caught.value.hop, caught.value.retryable) == ("client", True)
        await until(frontend, lambda fe: not fe.running)
    assert len(frontend.specs) == 1


async def test_a_closed_client_says_so():
    async with connected(ScriptedFrontend()) as client:
        await client.aclose()
        await client.aclose()
        with pytest.raises(RuntimeError, match="closed"):
            await client.generate("x")
