"""The process that sends the load: ``python -m benchmarks.peer.client``, jobs on standard input.

The same one for every system. Ends with its standard input.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Iterator

import msgspec

from benchmarks.peer.http_exchange import Exchange, read_answer, request_bytes
from benchmarks.peer.job import Answered, Done, Job


async def run_job(job: Job) -> Done:
    """``concurrency`` clients take turns at the bodies; each has one request at a time.

    Every request has a connection of its own.
    """
    requests = [request_bytes(job.host, job.port, body) for body in job.bodies]
    lengths = [_num_tokens(body) for body in job.bodies]
    raw: list[tuple[float, Exchange | None, str]] = [(0.0, None, "not sent")] * len(requests)
    left = iter(range(len(requests)))
    zero = time.perf_counter()

    async def client(left: Iterator[int]) -> None:
        for number in left:
            sent_at = time.perf_counter()
            raw[number] = (sent_at, *(await _exchange(job, requests[number])))

    async with asyncio.TaskGroup() as group:
        for _ in range(job.concurrency):
            group.create_task(client(left))
    return Done(
        tuple(
            Answered(sent_at - zero, error=problem)
            if exchange is None or problem
            else read_answer(exchange.news, sent_at, zero, num_tokens)
            for (sent_at, exchange, problem), num_tokens in zip(raw, lengths, strict=True)
        )
    )


async def _exchange(job: Job, request: bytes) -> tuple[Exchange | None, str]:
    """What came and what went wrong with the connection."""
    loop = asyncio.get_running_loop()
    exchange = None
    try:
        async with asyncio.timeout(job.timeout_s):
            _, exchange = await loop.create_connection(
                lambda: Exchange(request), job.host, job.port
            )
            await exchange.over
    except TimeoutError:
        if exchange is not None:
            exchange.abort()
        return exchange, f"not answered within {job.timeout_s:g} s"
    except OSError as exc:
        return exchange, f"no connection: {exc}"
    return exchange, ""


def _num_tokens(body: bytes) -> int:
    return int(msgspec.json.decode(body)["max_tokens"])


def main() -> None:
    """A line at a time: the pipe is read when nothing else is to be done."""
    for line in sys.stdin.buffer:
        job = msgspec.json.decode(line, type=Job)
        gc.collect()
        gc.disable()
        done = asyncio.run(run_job(job))
        gc.enable()
        sys.stdout.buffer.write(msgspec.json.encode(done) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
