"""One streamed OpenAI completion over HTTP/1.1: raw bytes and their times first, tokens later.

While a job runs, nothing is decoded: the client shares the processors with what it measures.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import h11
import msgspec

from benchmarks.peer.job import Answered

LAST_CHUNK = b"0\r\n\r\n"
OK = b"HTTP/1.1 200"
DONE = b"[DONE]"


class _Choice(msgspec.Struct, frozen=True):
    text: str = ""
    finish_reason: str | None = None


class _Usage(msgspec.Struct, frozen=True):
    completion_tokens: int = 0
    prompt_tokens: int = 0


class _Event(msgspec.Struct, frozen=True):
    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None
    error: Any = None


class Exchange(asyncio.Protocol):
    """``over`` is done when the connection is closed, which it is after the last byte."""

    def __init__(self, request: bytes) -> None:
        self.news: list[tuple[float, bytes]] = []
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._tail = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        is_refused = not self.news and not data.startswith(OK)
        self.news.append((time.perf_counter(), data))
        self._tail = (self._tail + data)[-len(LAST_CHUNK) :]
        if is_refused or self._tail == LAST_CHUNK:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(None)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def request_bytes(host: str, port: int, body: bytes) -> bytes:
    connection = h11.Connection(h11.CLIENT)
    return b"".join(
        connection.send(part) or b"" for part in (_head(host, port, body), h11.Data(body), _END)
    )


_END = h11.EndOfMessage()


def _head(host: str, port: int, body: bytes) -> h11.Request:
    return h11.Request(
        method="POST",
        target="/v1/completions",
        headers=[
            ("host", f"{host}:{port}"),
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
        ],
    )


def read_answer(
    news: Sequence[tuple[float, bytes]], sent_at: float, zero: float, num_tokens: int
) -> Answered:
    """What the bytes say. An answer that has not ``num_tokens`` tokens is an error.

    The benchmark's vocabulary has one word per token, so a text has as many tokens as words.
    """
    sent_s = sent_at - zero
    times: list[float] = []
    texts: list[str] = []
    finish_reason = None
    told = -1
    is_done = False
    try:
        for at, event in _events(news):
            if event == DONE:
                is_done = True
                continue
            found = msgspec.json.decode(event, type=_Event)
            if found.error is not None:
                return Answered(sent_s, error=str(found.error)[:300])
            if found.usage is not None:
                told = found.usage.completion_tokens
            for choice in found.choices:
                texts.append(choice.text)
                times += [at - zero] * len(choice.text.split())
                finish_reason = choice.finish_reason or finish_reason
    except (_Refused, h11.RemoteProtocolError, msgspec.DecodeError) as exc:
        return Answered(sent_s, error=str(exc))
    text = "".join(texts)
    if not is_done or finish_reason != "length":
        error = f"the stream broke off after {len(times)} tokens"
    elif not len(times) == len(text.split()) == told == num_tokens:
        error = f"{len(times)} tokens came and {told} were told, {num_tokens} were asked"
    else:
        error = ""
    return Answered(sent_s, tuple(times), text, error)


class _Refused(Exception):
    """Something else than an event stream came."""


def _events(news: Sequence[tuple[float, bytes]]) -> list[tuple[float, bytes]]:
    """The payloads of server-sent events, each with the time at which it was complete."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("host", "-")]))
    connection.send(_END)
    found = []
    left = b""
    for at, data in news:
        connection.receive_data(data)
        while (part := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            if isinstance(part, h11.Response) and part.status_code != 200:
                raise _Refused(f"HTTP {part.status_code}: {_body(news)}")
            if isinstance(part, h11.Data):
                *events, left = (left + bytes(part.data)).split(b"\n\n")
                found += [(at, e.removeprefix(b"data:").strip()) for e in events if e.strip()]
    return found


def _body(news: Sequence[tuple[float, bytes]]) -> str:
    whole = b"".join(data for _, data in news)
    return whole.partition(b"\r\n\r\n")[2][:300].decode(errors="replace")
