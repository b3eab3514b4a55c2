"""Running requests: iterators over chunks that cancel in every worker when left early."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from baton.api.v1 import baton_pb2 as pb
from baton.client import calls, responses
from baton.client.failures import explain
from baton.client.retry import Retry
from baton.client.types import Chunk, Completion
from baton.protocol.errors import BatonError, Cancelled


class Run:
    """What the two kinds of stream share: the request, its retries and its output so far."""

    def __init__(
        self,
        method: Callable[..., Any],
        request: pb.GenerateRequest | pb.ChatRequest,
        *,
        name: str,
        address: str,
        timeout_s: float | None,
        max_retries: int,
    ) -> None:
        self._method = method
        self._request = request
        self._name = name
        self._address = address
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._retry: Retry | None = None
        self._collector = responses.Collector(calls.num_choices(request))
        self._failure: BatonError | None = None
        self._ended = False
        self.rpc: Any = None

    @property
    def request_id(self) -> str:
        return self._request.request_id

    @property
    def over(self) -> bool:
        return self._ended or self._failure is not None

    def open(self) -> Any:
        """The call of this try. The first one starts the clock of ``timeout``."""
        if self.rpc is None:
            if self._retry is None:
                self._retry = calls.new_retry(self._max_retries, self._timeout_s)
            remaining_s = self._retry.remaining_s(time.monotonic())
            if remaining_s is not None:
                self._request.timeout_s = remaining_s
            self.rpc = self._method(self._request, timeout=calls.rpc_timeout_s(remaining_s))
        return self.rpc

    def take(self, message: pb.GenerateResponse) -> Chunk:
        chunk = responses.chunk(message)
        try:
            self._collector.add(chunk)
        except BatonError as exc:
            self.cancel()
            self._failure = exc
            raise
        return chunk

    def end(self) -> None:
        """The stream is over without an error. Raises WireError if output is missing."""
        self._ended = True
        try:
            self._collector.completion()
        except BatonError as exc:
            self._failure = exc
            raise

    def fail(self, cause: grpc.RpcError) -> float:
        """Seconds to wait before another try. Raises the error when there is none."""
        error = explain(cause, self._address, self._name, self._timeout_s)
        self.rpc = None
        delay_s = None
        if self._retry is not None and not self._collector.started:
            delay_s = self._retry.delay_s(error, time.monotonic())
        if delay_s is None:
            self._failure = error
            raise error from cause
        return delay_s

    def cancel(self) -> None:
        """Idempotent; a stream that has ended stays ended."""
        if self.over:
            return
        self._failure = Cancelled(
            "the stream was closed before its end", hop="client", request_id=self.request_id
        )
        if self.rpc is not None:
            self.rpc.cancel()

    def raise_failure(self) -> None:
        """Also on every later look: what was cut short must not look complete."""
        if self._failure is not None:
            raise self._failure

    def completion(self) -> Completion:
        self.raise_failure()
        return self._collector.completion()


class Stream(Iterator[Chunk]):
    """A running request. Iterate it; leave the ``with`` block to cancel what is left.

    Nothing is sent before the first chunk is asked for. Errors are BatonErrors; after one,
    the chunks that came before it stay valid. One thread iterates; any may ``cancel``.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._cancelled = threading.Event()

    @property
    def request_id(self) -> str:
        return self._run.request_id

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        while not self._run.over:
            try:
                message = next(self._run.open())
            except StopIteration:
                self._run.end()
                raise
            except grpc.RpcError as exc:
                self._run.raise_failure()
                self._cancelled.wait(self._run.fail(exc))
            else:
                return self._run.take(message)
        self._run.raise_failure()
        raise StopIteration

    def completion(self) -> Completion:
        """Wait for the end and return all of it, with the chunks already iterated.

        Raises the error that ended the stream, Cancelled after ``cancel``.
        """
        for _chunk in self:
            pass
        return self._run.completion()

    def cancel(self) -> None:
        """End the request in every worker that holds something of it."""
        self._run.cancel()
        self._cancelled.set()

    close = cancel

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()


class AsyncStream(AsyncIterator[Chunk]):
    """``Stream`` for asyncio: ``async with`` and ``async for``.

    Cancelling the task that iterates cancels the request too.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._cancelled = asyncio.Event()

    @property
    def request_id(self) -> str:
        return self._run.request_id

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        while not self._run.over:
            try:
                message = await self._run.open().read()
            except grpc.RpcError as exc:
                self._run.raise_failure()
                await self._wait(self._run.fail(exc))
            except asyncio.CancelledError:
                if not _being_cancelled():  # the call was, by our own cancel()
                    self._run.raise_failure()
                self.cancel()
                raise
            else:
                if message is grpc.aio.EOF:  # type: ignore[attr-defined]
                    self._run.end()
                    break
                return self._run.take(message)
        self._run.raise_failure()
        raise StopAsyncIteration

    async def completion(self) -> Completion:
        """Wait for the end and return all of it, with the chunks already iterated."""
        async for _chunk in self:
            pass
        return self._run.completion()

    def cancel(self) -> None:
        """End the request in every worker that holds something of it."""
        self._run.cancel()
        self._cancelled.set()

    async def aclose(self) -> None:
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        """Abandoned, as by ``break`` without ``async with``: gRPC would notice only when the
        garbage collector finds its cycles."""
        if hasattr(self, "_run"):
            self._run.cancel()

    async def _wait(self, delay_s: float) -> None:
        """Until the next try is due or the stream is cancelled."""
        try:
            async with asyncio.timeout(delay_s):
                await self._cancelled.wait()
        except TimeoutError:
            return


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
