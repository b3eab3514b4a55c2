"""The client keeps so many requests under way, never more, and tells what failed."""

import asyncio

import msgspec

from benchmarks.peer.client import run_job
from benchmarks.peer.job import Done, Job

ANSWER = (
    b'data: {"choices":[{"text":"t1 t2","finish_reason":"length"}]}\n\n'
    b'data: {"choices":[],"usage":{"completion_tokens":2}}\n\ndata: [DONE]\n\n'
)


async def run_against(bodies: list[bytes], concurrency: int) -> tuple[Done, list[int]]:
    """Also how many requests were under way when each came; answers wait for all that may."""
    under_way: list[int] = []
    open_now = 0
    full = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_now
        await reader.readuntil(b"\r\n\r\n")
        open_now += 1
        under_way.append(open_now)
        if open_now == concurrency:
            full.set()
        await full.wait()
        open_now -= 1
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(ANSWER), ANSWER))
        await writer.drain()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        done = await run_job(Job("127.0.0.1", port, tuple(bodies), concurrency, 20.0))
    return done, under_way


def test_as_many_at_once_as_there_are_clients() -> None:
    bodies = [msgspec.json.encode({"max_tokens": 2})] * 7
    done, under_way = asyncio.run(run_against(bodies, 3))
    assert [answer.error for answer in done.answers] == [""] * 7
    assert [answer.text for answer in done.answers] == ["t1 t2"] * 7
    assert max(under_way) == 3
    assert all(0 <= a.sent_s <= a.token_times_s[0] for a in done.answers)


def test_an_answer_of_another_length_is_an_error() -> None:
    done, _ = asyncio.run(run_against([b'{"max_tokens":3}'], 1))
    assert done.answers[0].error == "2 tokens came and 2 were told, 3 were asked"


def test_nobody_listens() -> None:
    job = Job("127.0.0.1", 1, (b'{"max_tokens":3}',), 1, 20.0)
    assert "no connection" in asyncio.run(run_job(job)).answers[0].error
