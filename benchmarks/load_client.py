"""The process that sends the load: ``python -m benchmarks.load_client``, jobs on stdin.

It shares the machine with what it measures, so during a job it only sends prepared bytes and
notes when bytes come back; they are decoded once the job is over. Ends with its stdin.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from contextlib import suppress
from typing import Any

import grpc
import msgspec

from baton.api.v1 import baton_pb2 as pb
from baton.client.calls import CHANNEL_OPTIONS
from baton.client.failures import explain
from benchmarks.load_job import (
    MAX_LINE_BYTES,
    Done,
    Job,
    PlannedRequest,
    Reply,
    RequestRecord,
    Started,
)

METHOD = "/baton.v1.Baton/Generate"
CONNECT_TIMEOUT_S = 2.0
TIMEOUT_MARGIN_S = 2.0
"""The router ends a request at its timeout; the call waits a little longer to hear it."""


class _Running:
    """One request under way: the bytes that came, and when."""

    def __init__(self, planned: PlannedRequest) -> None:
        self.planned = planned
        self.sent_at = 0.0
        self.news: list[tuple[float, bytes]] = []
        self.failure: grpc.RpcError | None = None
        self.is_over = False

    async def run(self, method: Any, timeout_s: float) -> None:
        self.sent_at = time.perf_counter()
        call = method(self.planned.message, timeout=timeout_s + TIMEOUT_MARGIN_S)
        try:
            while (raw := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                self.news.append((time.perf_counter(), raw))
        except grpc.RpcError as exc:
            self.failure = exc
        finally:
            call.cancel()
        self.is_over = True

    def record(self, job: Job, zero: float) -> RequestRecord:
        token_times: list[float] = []
        hop_ms: dict[str, float] = {}
        is_finished = False
        for at, raw in self.news:
            message = pb.GenerateResponse.FromString(raw)
            token_times.extend([at - zero] * len(message.tokens))
            if message.finish_reason:
                is_finished = True
                hop_ms = {span.name: span.duration_ms for span in message.timeline.spans}
        error = "" if is_finished else "wire_error"
        if self.failure is not None:
            error = explain(self.failure, job.address, "Generate", job.timeout_s).code
        return RequestRecord(
            arrival_s=self.planned.at_s,
            sent_s=self.sent_at - zero,
            is_measured=self.planned.is_measured,
            token_times_s=tuple(token_times),
            error=error,
            hop_ms=hop_ms,
        )


async def run_job(job: Job) -> Done:
    """Send every request at its time, whatever became of those before it (open loop)."""
    async with grpc.aio.insecure_channel(job.address, options=CHANNEL_OPTIONS) as channel:
        with suppress(TimeoutError):  # the requests then tell what is wrong
            await asyncio.wait_for(channel.channel_ready(), CONNECT_TIMEOUT_S)
        # Without serialisers gRPC takes and gives bytes as they are.
        method = channel.unary_stream(METHOD, None, None)
        running: list[_Running] = []
        measured: list[asyncio.Task[None]] = []
        answer(Started())
        zero = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            tasks = []
            for planned in job.requests:
                delay_s = zero + planned.at_s - time.perf_counter()
                if delay_s > 0:
                    await asyncio.sleep(delay_s)
                running.append(_Running(planned))
                task = group.create_task(running[-1].run(method, job.timeout_s))
                tasks.append(task)
                if planned.is_measured:
                    measured.append(task)
            if measured:
                await asyncio.wait(measured)
            for task in tasks:
                task.cancel()
        return Done(tuple(r.record(job, zero) for r in running if r.is_over))


def answer(reply: Reply) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(reply) + b"\n")
    sys.stdout.buffer.flush()


async def main() -> None:
    reader = asyncio.StreamReader(limit=MAX_LINE_BYTES)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        job = msgspec.json.decode(line, type=Job)
        gc.collect()
        gc.disable()
        try:
            done = await run_job(job)
        finally:
            gc.enable()
        answer(done)


if __name__ == "__main__":
    asyncio.run(main())
