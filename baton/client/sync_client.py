"""The blocking client. ``async_client`` is the same for asyncio."""

from __future__ import annotations

import threading
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
from baton.client.streams import Run, Stream
from baton.client.types import ChatMessage, Completion, Health, Loads, ModelInfo, Options


class Client:
    """Talks to one Baton router. Threads may share one; close it, or use ``with``.

        with baton.Client() as client:
            print(client.generate("def fib(n):", max_tokens=32, temperature=0).text)
            with client.stream("import ", max_tokens=32) as stream:
                for chunk in stream:
                    print(chunk.text, end="")

    address: ``host:port`` of the router's gRPC port.
    timeout: seconds for each call, retries included, where the call names none. None: the
      router's own limit for generation, 30 s for everything else. A generating call waits
      up to 1 s longer, for the router to say where the time went.
    max_retries: more tries for a call that failed in a retryable way *before any output*,
      with back-off and the same request id. After output the error is yours to judge.

    Every method raises subclasses of ``baton.BatonError``: ``hop`` says who failed
    (``client``: the call never arrived, or its answer did not), ``retryable`` whether the
    same call may succeed later.
    """

    def __init__(
        self,
        address: str = calls.DEFAULT_ADDRESS,
        *,
        timeout: float | None = None,
        max_retries: int = calls.DEFAULT_MAX_RETRIES,
    ) -> None:
        self.address = address
        self._timeout_s = calls.check_timeout(timeout)
        self._max_retries = max_retries
        self._closed = threading.Event()
        self._channel = grpc.insecure_channel(address, options=calls.CHANNEL_OPTIONS)
        self._stub: Any = baton_pb2_grpc.BatonStub(self._channel)

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Continue ``prompt`` (text or token ids) and return all of it at once."""
        with self.stream(prompt, **options) as stream:
            return stream.completion()

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """Continue ``prompt`` and iterate the chunks as they come."""
        request = requests.generate_request(prompt, options)
        return self._stream("Generate", request, options)

    def chat(self, messages: Iterable[ChatMessage], **options: Unpack[Options]) -> Completion:
        """Answer ``messages`` through the model's chat template, all at once."""
        with self.chat_stream(messages, **options) as stream:
            return stream.completion()

    def chat_stream(self, messages: Iterable[ChatMessage], **options: Unpack[Options]) -> Stream:
        """Answer ``messages`` and iterate the chunks as they come."""
        return self._stream("Chat", requests.chat_request(messages, options), options)

    def tokenize(
        self, text_or_messages: str | Iterable[ChatMessage], *, timeout: float | None = None
    ) -> list[int]:
        """The ids that ``generate`` or ``chat`` would compute on."""
        request = requests.tokenize_request(text_or_messages)
        return list(self._unary("Tokenize", request, timeout).token_ids)

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        timeout: float | None = None,
    ) -> str:
        request = requests.detokenize_request(token_ids, skip_special_tokens)
        text: str = self._unary("Detokenize", request, timeout).text
        return text

    def abort(self, request_id: str, *, timeout: float | None = None) -> bool:
        """End a running request, whoever started it; False if there is none of this id."""
        request = pb.AbortRequest(request_id=request_id)
        aborted: bool = self._unary("Abort", request, timeout).aborted
        return aborted

    def model_info(self, *, timeout: float | None = None) -> ModelInfo:
        return responses.model_info(self._unary("GetModelInfo", pb.GetModelInfoRequest(), timeout))

    def loads(self, *, timeout: float | None = None) -> Loads:
        """What the router and each worker are doing right now."""
        return responses.loads(self._unary("GetLoads", pb.GetLoadsRequest(), timeout))

    def health(self, *, timeout: float | None = None) -> Health:
        """Whether requests can be served now. Raises Unavailable where no router answers."""
        check = self._channel.unary_unary(
            calls.HEALTH_METHOD, request_serializer=bytes, response_deserializer=bytes
        )
        return calls.health(
            self._call("Health", check, calls.EMPTY_HEALTH_REQUEST, timeout, max_retries=0)
        )

    def close(self) -> None:
        """Cancels what still runs. Idempotent."""
        self._closed.set()
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _stream(
        self, name: str, request: pb.GenerateRequest | pb.ChatRequest, options: Options
    ) -> Stream:
        self._check_open()
        run = Run(
            getattr(self._stub, name),
            request,
            name=name,
            address=self.address,
            timeout_s=calls.check_timeout(options.get("timeout")) or self._timeout_s,
            max_retries=self._max_retries,
        )
        return Stream(run)

    def _unary(self, name: str, request: object, timeout: float | None) -> Any:
        return self._call(
            name, getattr(self._stub, name), request, timeout, max_retries=self._max_retries
        )

    def _call(
        self,
        name: str,
        method: Callable[..., Any],
        request: object,
        timeout: float | None,
        *,
        max_retries: int,
    ) -> Any:
        self._check_open()
        timeout_s = calls.small_call_timeout_s(timeout, self._timeout_s)
        retry = calls.new_retry(max_retries, timeout_s)
        while True:
            try:
                return method(request, timeout=retry.remaining_s(time.monotonic()))
            except grpc.RpcError as exc:
                error = explain(exc, self.address, name, timeout_s)
                delay_s = retry.delay_s(error, time.monotonic())
                if delay_s is None or self._closed.wait(delay_s):
                    raise error from exc

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise RuntimeError(f"this Client of {self.address} is closed")
