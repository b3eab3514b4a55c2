"""The SDK: needs grpcio and protobuf, and of Baton its stubs, ids and errors."""

from baton.client.async_client import AsyncClient
from baton.client.streams import AsyncStream, Stream
from baton.client.sync_client import Client
from baton.client.types import (
    ChatMessage,
    Choice,
    Chunk,
    Completion,
    Health,
    KvLink,
    Loads,
    ModelInfo,
    Options,
    Span,
    Timeline,
    Token,
    TokenLogprobs,
    TopLogprob,
    Usage,
    WorkerLoad,
)

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "ChatMessage",
    "Choice",
    "Chunk",
    "Client",
    "Completion",
    "Health",
    "KvLink",
    "Loads",
    "ModelInfo",
    "Options",
    "Span",
    "Stream",
    "Timeline",
    "Token",
    "TokenLogprobs",
    "TopLogprob",
    "Usage",
    "WorkerLoad",
]
