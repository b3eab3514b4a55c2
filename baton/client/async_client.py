"""The client for asyncio. ``sync_client`` is the same, blocking."""

# ruff: noqa: ASYNC109 - `timeout` is a number here as in the blocking client; it also
# travels to the router, which `asyncio.timeout` around the call could not do.

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from baton.api.v1 import baton_pb2 as pb
from baton.api.v1 import baton_pb2_grpc
from baton.client import calls, requests, responses
from baton.client.failures import explain
from baton.client.requests import Prompt
from baton.client.streams import AsyncStream, Run
from baton.client.types import ChatMessage, Completion, Health, Loads, ModelInfo, Options


class AsyncClient:
    """Talks to one Baton router from one event loop; otherwise as ``Client``.

        async with baton.AsyncClient() as client:
            print((await client.generate("def fib(n):", max_tokens=32)).text)
            async with client.stream("import ", max_tokens=32) as stream:
                async for chunk in stream:
                    print(chunk.text, end="")

    Cancelling a task that waits in one of these methods cancels the request everywhere.
    """

    def __init__(
        self,
        address: str = calls.DEFAULT_ADDRESS,
        *,
        timeout: float | None = None,
        max_retries: int = calls.DEFAULT_MAX_RETRIES,
    ) -> None:
        """As ``Client``; needs no running loop yet."""
        self.address = address
        self._timeout_s = calls.check_timeout(timeout)
        self._max_retries = max_retries
        self._closed = False
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Continue ``prompt`` (text or token ids) and return all of it at once."""
        async with self.stream(prompt, **options) as stream:
            return await stream.completion()

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncStream:
        """Continue ``prompt`` and iterate the chunks as they come."""
        request = requests.generate_request(prompt, options)
        return self._stream("Generate", request, options)

    async def chat(self, messages: Iterable[ChatMessage], **options: Unpack[Options]) -> Completion:
        """Answer ``messages`` through the model's chat template, all at once."""
        async with self.chat_stream(messages, **options) as stream:
            return await stream.completion()

    def chat_stream(
        self, messages: Iterable[ChatMessage], **options: Unpack[Options]
    ) -> AsyncStream:
        """Answer ``messages`` and iterate the chunks as they come."""
        return self._stream("Chat", requests.chat_request(messages, options), options)

    async def tokenize(
        self, text_or_messages: str | Iterable[ChatMessage], *, timeout: float | None = None
    ) -> list[int]:
        """The ids that ``generate`` or ``chat`` would compute on."""
        request = requests.tokenize_request(text_or_messages)
        return list((await self._unary("Tokenize", request, timeout)).token_ids)

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        timeout: float | None = None,
    ) -> str:
        request = requests.detokenize_request(token_ids, skip_special_tokens)
        text: str = (await self._unary("Detokenize", request, timeout)).text
        return text

    async def abort(self, request_id: str, *, timeout: float | None = None) -> bool:
        """End a running request, whoever started it; False if there is none of this id."""
        request = pb.AbortRequest(request_id=request_id)
        aborted: bool = (await self._unary("Abort", request, timeout)).aborted
        return aborted

    async def model_info(self, *, timeout: float | None = None) -> ModelInfo:
        return responses.model_info(
            await self._unary("GetModelInfo", pb.GetModelInfoRequest(), timeout)
        )

    async def loads(self, *, timeout: float | None = None) -> Loads:
        """What the router and each worker are doing right now."""
        return responses.loads(await self._unary("GetLoads", pb.GetLoadsRequest(), timeout))

    async def health(self, *, timeout: float | None = None) -> Health:
        """Whether requests can be served now. Raises Unavailable where no router answers."""
        self._connect()
        assert self._channel is not None
        check = self._channel.unary_unary(
            calls.HEALTH_METHOD, request_serializer=bytes, response_deserializer=bytes
        )
        return calls.health(
            await self._call("Health", check, calls.EMPTY_HEALTH_REQUEST, timeout, max_retries=0)
        )

    async def aclose(self) -> None:
        """Cancels what still runs. Idempotent."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def _stream(
        self, name: str, request: pb.GenerateRequest | pb.ChatRequest, options: Options
    ) -> AsyncStream:
        run = Run(
            lambda message, timeout: getattr(self._connect(), name)(message, timeout=timeout),
            request,
            name=name,
            address=self.address,
            timeout_s=calls.check_timeout(options.get("timeout")) or self._timeout_s,
            max_retries=self._max_retries,
        )
        return AsyncStream(run)

    async def _unary(self, name: str, request: object, timeout: float | None) -> Any:
        return await self._call(
            name, getattr(self._connect(), name), request, timeout, max_retries=self._max_retries
        )

    async def _call(
        self,
        name: str,
        method: Callable[..., Any],
        request: object,
        timeout: float | None,
        *,
        max_retries: int,
    ) -> Any:
        timeout_s = calls.small_call_timeout_s(timeout, self._timeout_s)
        retry = calls.new_retry(max_retries, timeout_s)
        while True:
            try:
                return await method(request, timeout=retry.remaining_s(time.monotonic()))
            except grpc.RpcError as exc:
                error = explain(exc, self.address, name, timeout_s)
                delay_s = retry.delay_s(error, time.monotonic())
                if delay_s is None or self._closed:
                    raise error from exc
            await asyncio.sleep(delay_s)

    def _connect(self) -> Any:
        """The stub; its channel belongs to the loop that runs at first use."""
        if self._closed:
            raise RuntimeError(f"this AsyncClient of {self.address} is closed")
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self.address, options=calls.CHANNEL_OPTIONS)
            self._stub = baton_pb2_grpc.BatonStub(self._channel)
        return self._stub
