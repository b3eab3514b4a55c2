"""From the arguments of the SDK to protobuf messages; both clients share it.

Values are judged by the router, whose messages say what is allowed. Here only what
protobuf itself cannot carry is refused, with the same error type.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from baton.api.v1 import baton_pb2 as pb
from baton.client.types import ChatMessage, Options
from baton.protocol.errors import InvalidRequest
from baton.protocol.ids import new_request_id

Prompt = str | Sequence[int]
"""Text, tokenised by the router, or token ids, taken as they are."""

_IN_REQUEST = ("priority", "model", "cache_salt", "kv_quality", "request_id", "timeout")
_IN_SAMPLING = tuple(name for name in Options.__annotations__ if name not in _IN_REQUEST)
_STRUCTURED = ("json_schema", "json_object", "regex", "grammar", "choice")


def generate_request(prompt: Prompt, options: Options) -> pb.GenerateRequest:
    """All but ``timeout_s``. Raises InvalidRequest, TypeError for an unknown option."""
    request = pb.GenerateRequest()
    with _carrying("prompt"):
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.CopyFrom(pb.TokenIds(ids=prompt))
    _set_options(request, options)
    return request


def chat_request(messages: Iterable[ChatMessage], options: Options) -> pb.ChatRequest:
    """As ``generate_request``."""
    request = pb.ChatRequest(messages=_messages(messages))
    _set_options(request, options)
    return request


def tokenize_request(text_or_messages: str | Iterable[ChatMessage]) -> pb.TokenizeRequest:
    if isinstance(text_or_messages, str):
        with _carrying("text"):
            return pb.TokenizeRequest(text=text_or_messages)
    return pb.TokenizeRequest(messages=pb.ChatMessages(messages=_messages(text_or_messages)))


def detokenize_request(token_ids: Sequence[int], skip_special_tokens: bool) -> pb.DetokenizeRequest:
    with _carrying("token_ids"):
        return pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)


def _messages(messages: Iterable[ChatMessage]) -> list[pb.ChatMessage]:
    with _carrying("messages"):
        return [pb.ChatMessage(**message) for message in messages]


def _set_options(request: pb.GenerateRequest | pb.ChatRequest, options: Options) -> None:
    """An option that is None counts as absent."""
    given: Mapping[str, object] = {k: v for k, v in options.items() if v is not None}
    request.request_id = new_request_id()
    request.sampling_params.SetInParent()
    structured = [name for name in _STRUCTURED if name in given]
    if len(structured) > 1:
        raise InvalidRequest(
            f"{' and '.join(structured)} given; allowed: one way of structuring the output",
            hop="client",
            param=structured[1],
        )
    for name, value in given.items():
        with _carrying(name):
            if name in _IN_SAMPLING:
                _set(request.sampling_params, name, value)
            elif name not in _IN_REQUEST:
                known = ", ".join(sorted(Options.__annotations__))
                raise TypeError(f"unknown option {name!r}; known: {known}")
            elif name != "timeout":
                _set(request, name, value)


def _set(message: object, name: str, value: object) -> None:
    if name == "stop" and isinstance(value, str):
        value = [value]
    if name == "choice":
        message, name = getattr(message, name), "texts"
    if name == "json_schema" and isinstance(value, Mapping):
        value = json.dumps(value)
    if isinstance(value, Mapping):
        getattr(message, name).update(value)
    elif isinstance(value, list | tuple):
        getattr(message, name).extend(value)
    else:
        setattr(message, name, value)


@contextmanager
def _carrying(param: str) -> Iterator[None]:
    """Numbers beyond their bits and lone surrogates are ValueErrors of protobuf."""
    try:
        yield
    except ValueError as exc:
        raise InvalidRequest(f"{param} cannot be sent: {exc}", hop="client", param=param) from exc
