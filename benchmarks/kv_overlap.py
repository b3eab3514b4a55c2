"""What of a hand-over is exposed: from the last step of prefill to the decode side's word that it
has all, by how KV is pushed.

A prefill worker (here) and a decode worker (another process) with a paced socket between them.
The pace is such that the raw KV of the longest prompt takes as long as its prefill: the bar is
that at most a quarter of the serialised transfer is exposed. Then, on that link and on an unpaced
one, prompts of several lengths are pushed whole and in as many parts as there are layers: the
switch point is where parts begin to pay, beside what the worker's own rule takes.

    python -m benchmarks.kv_overlap
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import click
import msgspec
import zmq.asyncio
from rich.console import Console
from rich.table import Table

from baton.checkpoint.find import resolve
from baton.engine.executor import Executor
from baton.messaging.link import Link, make_hello
from baton.protocol.clock import MonotonicClock
from baton.protocol.config import EngineConfig, KvTransferConfig, ModelConfig, PoolConfig
from baton.protocol.messages import (
    AnyMessage,
    Dispatch,
    RequestBody,
    RequestFailed,
    RouterAlive,
    TokenAck,
    TokenAckItem,
    TokenBatch,
    TransferAck,
    WorkerRef,
)
from baton.protocol.sampling import SamplingParams
from baton.protocol.spec import WorkerSpec
from benchmarks.kv.overlap_decode import UNPACED
from benchmarks.provenance import Provenance, provenance, slug
from prefill_worker.decider import FromDecode
from prefill_worker.service import PrefillService

RESULTS = Path(__file__).resolve().parent / "results"
PROMPT_TOKENS = 2_048
SWITCH_TOKENS = (32, 64, 128, 256, 512, 1_024)
CHUNK_TOKENS = 512
BAR = 0.25
NUM_BLOCKS, MAX_TOKENS = 512, 4_096


class Case(msgspec.Struct, frozen=True):
    """Milliseconds, medians. exposed: from the end of prefill to the decode side's answer."""

    link: str
    prompt_tokens: int
    push: str
    prefill_ms: float
    exposed_ms: float
    runs_ms: tuple[float, ...]


class Result(msgspec.Struct, frozen=True):
    made_at: str
    link_mb_s: float
    cases: tuple[Case, ...]
    exposed_part: float
    """Of the serialised transfer, with chunks and layers: median of ``parts``, each of two
    requests one after the other."""
    parts: tuple[float, ...]
    bar: float
    switch_tokens: dict[str, int]
    """By link: the fewest prompt tokens of those measured for which parts were faster."""
    where: Provenance


class Bench:
    """One prefill worker and its decode worker; each request alone."""

    def __init__(self, name: str, service: PrefillService, decode: WorkerRef, link: Link) -> None:
        """name: no two of one decode worker have the same."""
        self._name = name
        self._service = service
        self._decode = decode
        self._link = link
        self._random = random.Random(5)
        self._num_asked = 0
        self._prefilled_at = 0.0
        self._acked: asyncio.Future[float] | None = None
        handle = service.decider.handle

        def timed(event: object, now: float) -> list[object]:
            if isinstance(event, FromDecode) and isinstance(event.message, TransferAck):
                assert self._acked is not None
                self._acked.set_result(time.monotonic())
            return handle(event, now)

        service.decider.handle = timed  # type: ignore[method-assign]
        sender = service.decider._sender
        prefill_done, self._parts = sender.prefill_done, sender.parts

        def done(transfer_id: str, token_ids: tuple[int, ...], now: float) -> list[object]:
            self._prefilled_at = time.monotonic()
            return [*prefill_done(transfer_id, token_ids, now)]

        sender.prefill_done = done  # type: ignore[method-assign, assignment]

    def failed(self, message: RequestFailed) -> None:
        if self._acked is not None and not self._acked.done():
            self._acked.set_exception(RuntimeError(message.message))

    def push(self, how: str) -> None:
        """whole: with the end of its chunk's step. parts: layer after layer. auto: as predicted."""
        sender = self._service.decider._sender
        fixed = {"whole": 1, "parts": sender.num_layers}
        rule: Callable[..., int] = self._parts
        if how in fixed:
            rule = lambda *_, **__: fixed[how]  # noqa: E731
        sender.parts = rule  # type: ignore[method-assign]

    async def ask(self, num_tokens: int) -> tuple[float, float]:
        """(prefill, exposed) seconds of one request."""
        self._num_asked += 1
        self._acked = asyncio.get_running_loop().create_future()
        body = RequestBody(
            request_id=f"{self._name}-{self._num_asked}",
            attempt=0,
            router_id=f"for-{self._name}",
            router_epoch=1,
            prompt_ids=tuple(self._random.randrange(256) for _ in range(num_tokens)),
            output_ids=(),
            sampling=SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True),
            priority=0,
            deadline_in_s=120.0,
        )
        began = time.monotonic()
        self._link.send(Dispatch(body, self._decode))
        acked_at = await asyncio.wait_for(self._acked, 120.0)
        return self._prefilled_at - began, acked_at - self._prefilled_at


def _spec(worker_id: str, role: str, budget: int) -> WorkerSpec:
    engine = EngineConfig(num_blocks=NUM_BLOCKS, max_num_batched_tokens=budget, prefix_cache=False)
    return WorkerSpec(
        worker_id=worker_id,
        pool=PoolConfig(name="b", role=role, engine=engine),  # type: ignore[arg-type]
        model=ModelConfig(path="baton-tiny", dtype="float32"),
        kv_transfer=KvTransferConfig(transport="zeromq", codec="raw", max_frame_bytes=256 * 1024),
    )


@contextlib.contextmanager
def _decode_process() -> Iterator[tuple[WorkerRef, Callable[[float], None]]]:
    spec = msgspec.json.encode(_spec("d-0", "decode", CHUNK_TOKENS)).decode()
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.kv.overlap_decode", spec],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    pipe = process.stdin

    def pace(bytes_per_s: float) -> None:
        pipe.write(f"{bytes_per_s}\n")
        pipe.flush()

    try:
        address = json.loads(process.stdout.readline())["address"]
        yield WorkerRef("d-0", "bench-d", address), pace
    finally:
        pipe.close()
        process.wait(30)


@contextlib.asynccontextmanager
async def _serving(executor: Executor, decode: WorkerRef, budget: int) -> AsyncIterator[Bench]:
    name = f"budget-{budget}"
    service = PrefillService(_spec(name, "prefill", budget), "1", executor, MonotonicClock())
    context = zmq.asyncio.Context()

    def heard(message: AnyMessage) -> None:
        if isinstance(message, TokenBatch):
            acks = [
                TokenAckItem(i.request_id, i.attempt, i.seq + len(i.token_ids))
                for i in message.items
            ]
            by_worker[message.worker_id].send(TokenAck(tuple(acks)))
        if isinstance(message, RequestFailed):
            bench.failed(message)

    hello = make_hello(f"for-{name}", "1", "router")
    links = [Link(context, where, hello, heard) for where in (service.bind(), decode.address)]
    by_worker = dict(zip((name, "d-0"), links, strict=True))
    for link in links:
        link.connect()

    async def alive() -> None:
        while True:
            for link in links:
                link.send(RouterAlive(1))
            await asyncio.sleep(1.0)

    bench = Bench(name, service, decode, links[0])
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(work) for work in (service.run(), alive(), *(k.run() for k in links))]
    try:
        yield bench
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        context.destroy(linger=0)


async def _case(bench: Bench, link: str, num_tokens: int, push: str, runs: int) -> Case:
    bench.push(push)
    # The rule wants to have seen the link; what is compiled on first use is compiled.
    await bench.ask(num_tokens)
    found = [await bench.ask(num_tokens) for _ in range(runs)]
    return Case(
        link,
        num_tokens,
        push,
        round(statistics.median(p for p, _ in found) * 1e3, 2),
        round(statistics.median(e for _, e in found) * 1e3, 2),
        tuple(round(e * 1e3, 2) for _, e in found),
    )


async def measure(runs: int) -> Result:
    executor = Executor.load(
        resolve("baton-tiny"),
        dtype="float32",
        device="cpu",
        num_blocks=NUM_BLOCKS,
        block_size=16,
        num_threads=1,
    )
    cases: list[Case] = []
    with _decode_process() as (decode, pace):
        async with _serving(executor, decode, MAX_TOKENS) as bench:
            warm = await _case(bench, "unpaced", PROMPT_TOKENS, "whole", runs)
            rate = PROMPT_TOKENS * executor.layout.bytes_per_token / (warm.prefill_ms / 1e3)
            for link, bytes_per_s in (("paced", rate), ("unpaced", UNPACED)):
                pace(bytes_per_s)
                for push in ("whole", "parts", "auto"):
                    cases.append(await _case(bench, link, PROMPT_TOKENS, push, runs))
                for num_tokens in SWITCH_TOKENS:
                    for push in ("whole", "parts", "auto"):
                        cases.append(await _case(bench, link, num_tokens, push, runs))
        parts: list[float] = []
        async with contextlib.AsyncExitStack() as stack:
            whole, chunks = [
                await stack.enter_async_context(_serving(executor, decode, budget))
                for budget in (MAX_TOKENS + 1, CHUNK_TOKENS)
            ]
            for run in range(runs + 1):
                # Turn by turn, each at the pace that its own prefill was last seen to ask for.
                serial = await _paced_to_prefill(whole, "whole", pace, executor)
                exposed = await _paced_to_prefill(chunks, "auto", pace, executor)
                parts += [exposed / serial] if run else []
    executor.close()
    return Result(
        made_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        link_mb_s=round(rate / 1e6, 2),
        cases=tuple(cases),
        exposed_part=round(statistics.median(parts), 3),
        parts=tuple(round(part, 3) for part in parts),
        bar=BAR,
        switch_tokens={link: _switch(cases, link) for link in ("paced", "unpaced")},
        where=provenance(),
    )


async def _paced_to_prefill(
    bench: Bench, push: str, pace: Callable[[float], None], executor: Executor
) -> float:
    """Exposed, over the time that the link takes for the raw KV: as long as prefill."""
    bench.push(push)
    prefill_s, _ = await bench.ask(PROMPT_TOKENS)
    pace(PROMPT_TOKENS * executor.layout.bytes_per_token / prefill_s)
    _, exposed_s = await bench.ask(PROMPT_TOKENS)
    return exposed_s / prefill_s


def _exposed(cases: list[Case], link: str, num_tokens: int, push: str) -> float:
    [case] = [c for c in cases if (c.link, c.prompt_tokens, c.push) == (link, num_tokens, push)]
    return case.exposed_ms


def _switch(cases: list[Case], link: str) -> int:
    """0: at none of the lengths."""
    lengths = (*SWITCH_TOKENS, PROMPT_TOKENS)
    pays = [_exposed(cases, link, n, "parts") < _exposed(cases, link, n, "whole") for n in lengths]
    return next((n for n, paid in zip(lengths, pays, strict=True) if paid), 0)


def _show(result: Result, console: Console) -> None:
    table = Table(title=f"exposed of a hand-over; paced: {result.link_mb_s} MB/s")
    for column in ("link", "prompt", "push", "prefill ms", "exposed ms"):
        table.add_column(column, justify="right")
    for c in result.cases:
        row = (c.link, c.prompt_tokens, c.push, c.prefill_ms, c.exposed_ms)
        table.add_row(*map(str, row))
    console.print(table)
    console.print(
        f"exposed {result.exposed_part:.1%} of the serialised transfer, at most {result.bar:.0%} "
        f"wanted; parts pay from {result.switch_tokens} prompt tokens on"
    )


@click.command(help=__doc__)
@click.option("--runs", default=5, show_default=True, help="Requests of each case.")
@click.option("--save/--no-save", default=True, help="Write benchmarks/results/kv-overlap_*.json.")
def main(runs: int, save: bool) -> None:
    result = asyncio.run(measure(runs))
    _show(result, Console())
    if save:
        name = (
            f"kv-overlap_{slug(result.where.hardware)}_{result.made_at[:7].replace('-', '')}.json"
        )
        (RESULTS / name).write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    if result.exposed_part > result.bar:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
