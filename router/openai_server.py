"""``/v1/*``: OpenAI-compatible completions over a ``Frontend``.

A failure before the first output is an HTTP status; after it, it is an ``error`` event in
the stream, which then ends without ``[DONE]``. A client that goes away closes the front
end's iterators, which aborts the request in every process.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from router.frontend import Frontend, GenerateSpec
from router.http_body import read_json_body
from router.http_endpoint import endpoint, request_id_of
from router.logprob_cap import check_together
from router.openai_answer import Answer
from router.openai_echo import Echo, echoes_of
from router.openai_format import ChatFormat, CompletionFormat
from router.openai_request import (
    chat_raw_request,
    completion_raw_requests,
    read_chat_request,
    read_completion_request,
)
from router.openai_response import AnswerResponse
from router.openai_types import CommonRequest, ModelCard, ModelList
from router.tokenizer import Tokenizer
from router.validation import Validator


class OpenAiServer:
    def __init__(self, frontend: Frontend, validator: Validator, tokenizer: Tokenizer) -> None:
        self._frontend = frontend
        self._validator = validator
        self._tokenizer = tokenizer

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", endpoint(self.models), methods=["GET"]),
            Route("/v1/models/{model:path}", endpoint(self.model), methods=["GET"]),
            Route("/v1/completions", endpoint(self.completions), methods=["POST"]),
            Route("/v1/chat/completions", endpoint(self.chat_completions), methods=["POST"]),
        ]

    async def models(self, request: Request) -> Response:
        return _json(ModelList(data=[self._card()]))

    async def model(self, request: Request) -> Response:
        self._validator.check_model(request.path_params["model"])
        return _json(self._card())

    async def completions(self, request: Request) -> AnswerResponse:
        body = read_completion_request(await read_json_body(request))
        request_id = request_id_of(request, body.request_id)
        raws = completion_raw_requests(body, request_id)
        specs = [await self._validator.generate_spec_off_loop(raw) for raw in raws]
        check_together(specs)
        answer = self._answer(
            specs,
            f"cmpl-{request_id}",
            body,
            echoes=await echoes_of(specs, self._tokenizer) if body.echo else (),
        )
        return AnswerResponse(
            self._frontend,
            specs,
            body,
            answer,
            CompletionFormat(answer, self._tokenizer),
            request_id=request_id,
        )

    async def chat_completions(self, request: Request) -> AnswerResponse:
        body = read_chat_request(await read_json_body(request))
        request_id = request_id_of(request, body.request_id)
        raw = chat_raw_request(body, request_id)
        specs = [await self._validator.generate_spec_off_loop(raw)]
        answer = self._answer(specs, f"chatcmpl-{request_id}", body)
        return AnswerResponse(
            self._frontend,
            specs,
            body,
            answer,
            ChatFormat(answer, self._tokenizer),
            request_id=request_id,
        )

    def _answer(
        self,
        specs: Sequence[GenerateSpec],
        answer_id: str,
        body: CommonRequest,
        *,
        echoes: Sequence[Echo] = (),
    ) -> Answer:
        return Answer(
            specs,
            answer_id=answer_id,
            created_unix_s=int(time.time()),
            model=self._frontend.model.name,
            echoes=echoes,
            num_prompt_logprobs=-1 if body.prompt_logprobs is None else body.prompt_logprobs,
            scores_only=bool(echoes) and body.num_tokens_asked == 0,
        )

    def _card(self) -> ModelCard:
        model = self._frontend.model
        return ModelCard(
            id=model.name, created=model.created_unix_s, max_model_len=model.max_model_len
        )


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
