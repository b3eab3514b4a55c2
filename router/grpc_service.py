"""The calls of ``baton.v1.Baton`` over a ``Frontend``. No request state is kept here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError

from baton.api.v1 import baton_pb2 as pb
from baton.protocol.errors import BatonError, DeadlineExceeded, InternalError, InvalidRequest
from baton.protocol.ids import RequestId
from router import grpc_convert as convert
from router import off_loop
from router.frontend import Frontend, GenerateSpec, Output
from router.raw_request import RawRequest
from router.tokenizer import Tokenizer
from router.validation import Validator

ERROR_DETAIL_KEY = "baton-error-bin"

INLINE_DETOKENISE_IDS = 8_192
"""Longer lists leave the event loop for a thread."""

MAX_KEPT_TEXTS = 32_768
"""Texts of single tokens."""

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class BatonServicer:
    """Methods named as the calls of ``baton.v1.Baton``; ``handlers`` makes gRPC call them."""

    def __init__(self, frontend: Frontend, validator: Validator, tokenizer: Tokenizer) -> None:
        self._frontend = frontend
        self._validator = validator
        self._tokenizer = tokenizer
        # An answer with log-probabilities asks for thousands of texts, mostly the same ones.
        self._token_text = lru_cache(MAX_KEPT_TEXTS)(self._decode_token)

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        await self._generate(request, context)

    async def Chat(self, request: pb.ChatRequest, context: Context) -> None:
        await self._generate(request, context)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        if request.WhichOneof("input") == "messages":
            raw = RawRequest(messages=convert.chat_messages(request.messages.messages))
        elif request.text:
            raw = RawRequest(prompt=request.text)
        else:
            return pb.TokenizeResponse()
        spec = await self._validator.generate_spec_off_loop(raw)
        return pb.TokenizeResponse(token_ids=spec.prompt_ids)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        ids = tuple(request.token_ids)
        self._check_ids(ids)
        skip = request.skip_special_tokens or not request.HasField("skip_special_tokens")
        if len(ids) <= INLINE_DETOKENISE_IDS:
            return pb.DetokenizeResponse(text=self._tokenizer.decode(ids, skip))
        return pb.DetokenizeResponse(
            text=await asyncio.to_thread(self._tokenizer.decode, ids, skip)
        )

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        if not request.request_id:
            raise InvalidRequest(
                "request_id is empty; allowed: the id of a running request",
                param="request_id",
            )
        return pb.AbortResponse(aborted=self._frontend.abort(RequestId(request.request_id)))

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        return convert.model_info(self._frontend.model)

    async def GetLoads(self, request: pb.GetLoadsRequest, context: Context) -> pb.GetLoadsResponse:
        return convert.loads(self._frontend.loads())

    async def _generate(
        self, request: pb.GenerateRequest | pb.ChatRequest, context: Context
    ) -> None:
        """gRPC cancels this coroutine when the client cancels, goes away or its deadline
        passes; leaving ``aclosing`` then aborts the request in the core."""
        raw = convert.raw_request(request)
        spec = _within_deadline(await self._validator.generate_spec_off_loop(raw), context)
        outputs = cast("AsyncGenerator[Output, None]", self._frontend.generate(spec))
        async with aclosing(outputs):
            async for output in outputs:
                response = await self._response(output, spec)
                # Waits while the client is slow to read: outputs then queue in the core,
                # which bounds them, and not in here.
                await context.write(response)

    async def _response(self, output: Output, spec: GenerateSpec) -> pb.GenerateResponse:
        sampling = spec.sampling
        num_logprobs = len(output.tokens) * (sampling.num_logprobs + 1)
        num_logprobs += len(output.prompt_tokens) * (sampling.num_prompt_logprobs + 1)
        return await off_loop.build(
            lambda: convert.generate_response(output, self._token_text), num_logprobs
        )

    def _decode_token(self, token_id: int) -> str:
        return self._tokenizer.decode((token_id,), skip_special_tokens=False)

    def _check_ids(self, ids: tuple[int, ...]) -> None:
        model = self._frontend.model
        if len(ids) > model.max_model_len:
            raise InvalidRequest(
                f"token_ids has {len(ids)} ids; allowed: at most max_model_len "
                f"{model.max_model_len}",
                param="token_ids",
            )
        for index, token_id in enumerate(ids):
            if not 0 <= token_id < model.vocab_size:
                raise InvalidRequest(
                    f"token_ids[{index}] is {token_id}; allowed: 0 to {model.vocab_size - 1}",
                    param="token_ids",
                )


def handlers(servicer: BatonServicer) -> grpc.GenericRpcHandler[Any, Any]:
    """Instead of the generated registration, which answers bytes that are no message with
    UNKNOWN, the name of a Python class, and a traceback in the log for each."""
    service = pb.DESCRIPTOR.services_by_name["Baton"]
    of_method = {}
    for method in service.methods:
        make = (
            grpc.unary_stream_rpc_method_handler
            if method.server_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        read = getattr(pb, method.input_type.name).FromString
        of_method[method.name] = make(
            _reading(read, getattr(servicer, method.name)),
            response_serializer=getattr(pb, method.output_type.name).SerializeToString,
        )
    return grpc.method_handlers_generic_handler(service.full_name, of_method)


def _reading(
    read: Callable[[bytes], Any], method: Callable[[Any, Context], Awaitable[Any]]
) -> Callable[[bytes, Context], Awaitable[Any]]:
    async def call(raw: bytes, context: Context) -> Any:
        async with _errors_as_status(context):
            try:
                request = read(raw)
            except DecodeError as exc:
                raise InvalidRequest(
                    "the bytes of the call are not the message that it takes; allowed: the "
                    "messages of package baton.v1"
                ) from exc
            return await method(request, context)

    return call


def _within_deadline(spec: GenerateSpec, context: Context) -> GenerateSpec:
    """The sooner of the request's own limit and the deadline of the call."""
    remaining_s = context.time_remaining()
    if remaining_s is None:
        return spec
    if remaining_s <= 0:
        raise DeadlineExceeded(
            "the deadline of the call passed before the request was admitted",
            hop="router",
            request_id=spec.request_id,
        )
    return replace(spec, timeout_s=min(spec.timeout_s, remaining_s))


@asynccontextmanager
async def _errors_as_status(context: Context) -> AsyncIterator[None]:
    """BatonErrors end the call with their status and an ErrorDetail in the trailing
    metadata; anything else is ours, is logged, and tells the client nothing of the inside."""
    try:
        yield
    except BatonError as exc:
        await _abort(context, exc)
    except Exception:
        log.exception("a gRPC call failed by a bug of the router")
        await _abort(
            context, InternalError("the router failed; its log has the details", hop="router")
        )


async def _abort(context: Context, error: BatonError) -> None:
    if not error.hop:
        error.hop = "router"
    await context.abort(
        grpc.StatusCode[error.grpc_status],
        convert.cut(str(error), convert.MAX_STATUS_BYTES),
        ((ERROR_DETAIL_KEY, convert.error_detail(error).SerializeToString()),),
    )
