"""Sends one answer, whole or as server-sent events, and stops when its client is gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence

import msgspec
from msgspec import UNSET
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from baton.protocol.errors import BatonError
from router import off_loop
from router.closing import closing
from router.frontend import Frontend, GenerateSpec, Output
from router.http_errors import error_json, error_response, our_bug
from router.openai_answer import Answer
from router.openai_format import AnswerFormat, ChunkUsage
from router.openai_types import CommonRequest

_LOG = logging.getLogger(__name__)

OnOutput = Callable[[int, Output], Awaitable[None]]
"""Called with the index of the prompt."""


class AnswerResponse:
    """An ASGI application for one request: it runs ``specs`` when it is called."""

    def __init__(
        self,
        frontend: Frontend,
        specs: Sequence[GenerateSpec],
        request: CommonRequest,
        answer: Answer,
        shape: AnswerFormat,
        *,
        request_id: str,
    ) -> None:
        self._frontend = frontend
        self._specs = specs
        self._request = request
        self._answer = answer
        self._shape = shape
        self._request_id = request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        send_answer = self._stream if self._request.stream else self._send_whole
        await _while_connected(receive, send_answer(scope, receive, send))

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def gather(prompt_index: int, output: Output) -> None:
            self._answer.keep(self._answer.count(prompt_index, output), output)

        try:
            await self._run(gather)
            body = await off_loop.build(
                lambda: msgspec.json.encode(self._shape.whole()), self._answer.num_logprobs_kept
            )
            response = Response(body, media_type="application/json")
        except Exception as exc:
            response = error_response(self._for_client(exc), self._request_id)
        response.headers["x-request-id"] = self._request_id
        await response(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = _EventStream(send, self._request_id)

        async def tell(prompt_index: int, output: Output) -> None:
            index = self._answer.count(prompt_index, output)
            await events.send(await self._encoded(index, output))

        try:
            await self._run(tell)
            if self._request.wants_usage:
                await events.send([msgspec.json.encode(self._shape.usage_chunk())])
            await events.send([b"[DONE]"])
        except Exception as exc:
            error = self._for_client(exc)
            if not events.started:
                response = error_response(error, self._request_id)
                response.headers["x-request-id"] = self._request_id
                await response(scope, receive, send)
                return
            await events.send([error_json(error, self._request_id)])
        await events.end()

    async def _encoded(self, index: int, output: Output) -> list[bytes]:
        """A choice's outputs come one after the other, so its format may be in one thread at a
        time."""
        usage = self._usage_of(index)

        def encode() -> list[bytes]:
            chunks = self._shape.chunks(index, output, usage)
            return [msgspec.json.encode(chunk) for chunk in chunks]

        num_logprobs = self._answer.num_logprobs_of(output.tokens, output.prompt_tokens)
        return await off_loop.build(encode, num_logprobs)

    async def _run(self, on_output: OnOutput) -> None:
        """Raises the first failure; the other prompts are aborted then."""
        runs = [self._run_one(index, on_output) for index in range(len(self._specs))]
        if len(runs) == 1:
            await runs[0]
        else:
            await _all_or_first_error(runs)
        self._answer.check_complete()

    async def _run_one(self, prompt_index: int, on_output: OnOutput) -> None:
        async with closing(self._frontend.generate(self._specs[prompt_index])) as outputs:
            async for output in outputs:
                await on_output(prompt_index, self._answer.shown(output))

    def _usage_of(self, index: int) -> ChunkUsage:
        if self._request.wants_usage_in_every_chunk:
            return self._answer.choices[index].usage
        return None if self._request.wants_usage else UNSET

    def _for_client(self, exc: Exception) -> BatonError:
        if isinstance(exc, BatonError):
            return exc
        _LOG.error("request %s failed", self._request_id, exc_info=exc)
        return our_bug(self._request_id)


class _EventStream:
    """Headers go out with the first event, so that an early failure can be a status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        # Several prompts may send at once: the headers must be first, events whole.
        self._lock = asyncio.Lock()
        self.started = False

    async def send(self, events: Iterable[bytes]) -> None:
        """Waits while the client's buffers are full."""
        body = b"".join(b"data: " + event + b"\n\n" for event in events)
        async with self._lock:
            if not self.started:
                self.started = True
                await self._send_headers()
            await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_headers(self) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
            (b"x-request-id", self._request_id.encode()),
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})


async def _while_connected(receive: Receive, work: Coroutine[None, None, None]) -> None:
    """Cancel ``work`` when the client leaves."""
    async with asyncio.TaskGroup() as group:
        working = group.create_task(work)
        watching = group.create_task(_until_disconnect(receive))
        watching.add_done_callback(lambda _: working.cancel())
        working.add_done_callback(lambda _: watching.cancel())


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _all_or_first_error(works: Sequence[Coroutine[None, None, None]]) -> None:
    """Like a task group, but raises the first error itself and not a group of them."""
    try:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(work)
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
