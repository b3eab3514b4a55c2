"""How fast KV frames travel between two processes of one host, by each transport.

Beside a plain TCP socket and a copy in memory, measured in the same run, turn by turn. "arrived":
the receiver has the frame where it can read it; "landed": it has copied it into memory of its
own, as a decode worker writes KV into its blocks. A plain socket reads into such memory, so its
frames land as they arrive. The sender's bytes lie in its own memory, and what goes into a
transport's (shared memory) is copied there, as KV is gathered there from its blocks.

    python -m benchmarks.kv_transport
"""

from __future__ import annotations

import asyncio
import datetime
import os
import socket
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from pathlib import Path

import click
import msgspec
import numpy as np
import xxhash
import zmq.asyncio
from rich.console import Console
from rich.table import Table

from baton.messaging.sockets import MAX_PART_BYTES
from baton.protocol.messages import KvOffer
from benchmarks.provenance import Provenance, provenance, slug
from kv_transfer.transports.contract import QUEUE_FRAMES
from kv_transfer.transports.make import make_receiver, make_sender
from kv_transfer.transports.pair_group import is_available

RESULTS = Path(__file__).resolve().parent / "results"
FRAME_MIB = (1, 4, 16)
KINDS = ("shared_memory", "zeromq", "zeromq_ipc", "gloo")
SOCKET, MEMCPY = "socket", "memcpy"
LAST = b"last"
BARS = (
    # The rate of this, over the rate of that, at 16 MiB, at least so much.
    ("zeromq", SOCKET, 0.80),
    ("shared_memory", MEMCPY, 0.60),
)


class Rate(msgspec.Struct, frozen=True):
    """GB/s (1e9) of payload; of all runs the median, and the fastest."""

    way: str
    frame_mib: int
    lands: bool
    median_gb_s: float
    best_gb_s: float
    runs_gb_s: tuple[float, ...]


class Bar(msgspec.Struct, frozen=True):
    """ratio: median over median; best_ratio: fastest run over fastest run."""

    way: str
    over: str
    lands: bool
    ratio: float
    best_ratio: float
    at_least: float


class Result(msgspec.Struct, frozen=True):
    theme: str
    measured_at: str
    provenance: Provenance
    mib_per_run: int
    rates: tuple[Rate, ...]
    bars: tuple[Bar, ...]
    checksum_gb_s: dict[str, float]


# --- the receiving process ---------------------------------------------------------------


class Landing:
    """Takes frames; ``lands`` copies each into memory that is used again for every frame."""

    def __init__(self, lands: bool, largest: int) -> None:
        self._own = np.zeros(largest, np.uint8) if lands else None

    async def on_part(self, head: memoryview, payload: memoryview | None) -> None:
        if payload is not None and self._own is not None:
            self._own[: payload.nbytes] = np.frombuffer(payload, np.uint8)
        if bytes(head) == LAST:
            print("done", flush=True)


async def _receive(kind: str, lands: bool) -> None:
    landing = Landing(lands, MAX_PART_BYTES)
    receiver = make_receiver(kind, zmq.asyncio.Context(), landing.on_part)
    print(msgspec.json.encode(receiver.bind("127.0.0.1")).decode(), flush=True)
    await receiver.run()


def _receive_by_socket() -> None:
    """Frames behind their length, read into one buffer; length 0 asks for the word "done"."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    connection, _ = listener.accept()
    own = memoryview(bytearray(MAX_PART_BYTES))
    length = memoryview(bytearray(8))
    while connection.recv_into(length, 8, socket.MSG_WAITALL):
        left = own[: int.from_bytes(length, "little")]
        if not left:
            print("done", flush=True)
        while left:
            left = left[connection.recv_into(left) :]


@contextmanager
def child(*args: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.kv_transport", *args],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise click.ClickException("the receiving process ended")
    return line


# --- each way, ready to run again and again ------------------------------------------------

Run = Callable[[int], Awaitable[float]]
"""Send so many frames; the seconds until the other process has the last one."""


def source(num_bytes: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, num_bytes, np.uint8)


@asynccontextmanager
async def by_memcpy(frame: np.ndarray) -> AsyncIterator[Run]:
    target = np.zeros_like(frame)

    async def run(num_frames: int) -> float:
        began = time.perf_counter()
        for _ in range(num_frames):
            target[:] = frame
        return time.perf_counter() - began

    yield run


@asynccontextmanager
async def by_socket(frame: np.ndarray) -> AsyncIterator[Run]:
    length = frame.nbytes.to_bytes(8, "little")
    with (
        child("receive-by-socket") as process,
        socket.create_connection(("127.0.0.1", int(line_of(process)))) as connection,
    ):

        async def run(num_frames: int) -> float:
            began = time.perf_counter()
            for _ in range(num_frames):
                connection.sendall(length)
                connection.sendall(frame.data)
            connection.sendall(bytes(8))
            line_of(process)
            return time.perf_counter() - began

        yield run


@asynccontextmanager
async def by_transport(kind: str, lands: bool, frame: np.ndarray) -> AsyncIterator[Run]:
    context = zmq.asyncio.Context()
    with child("receive", kind, *(["--lands"] if lands else [])) as process:
        offer = msgspec.json.decode(line_of(process), type=KvOffer)
        sender = make_sender(kind, context, frame.nbytes)
        await sender.connect(offer)

        async def run(num_frames: int) -> float:
            began = time.perf_counter()
            for _ in range(num_frames):
                room = await sender.room(frame.nbytes)
                if room is not None:
                    np.frombuffer(room, np.uint8)[:] = frame
                await sender.send(b"frame", frame.data if room is None else room)
            await sender.send(LAST, None)
            await asyncio.to_thread(line_of, process)
            return time.perf_counter() - began

        try:
            yield run
        finally:
            sender.close()
            context.destroy(linger=0)


# --- all of it ---------------------------------------------------------------------------


def ways(frame: np.ndarray) -> Iterator[tuple[str, bool, AbstractAsyncContextManager[Run]]]:
    """(name, whether frames land, the way itself)."""
    yield MEMCPY, True, by_memcpy(frame)
    yield SOCKET, True, by_socket(frame)
    for kind in KINDS:
        if kind != "gloo" or is_available("gloo"):
            yield kind, False, by_transport(kind, False, frame)
            yield kind, True, by_transport(kind, True, frame)


async def measure(
    mib_per_run: int, num_repeats: int, frame_mib: int, tell: Callable[[str], None]
) -> list[Rate]:
    frame, num_frames = source(frame_mib * 2**20), max(1, mib_per_run // frame_mib)
    runs: dict[tuple[str, bool], list[float]] = {}
    async with AsyncExitStack() as stack:
        ready = [(n, x, await stack.enter_async_context(way)) for n, x, way in ways(frame)]
        for repeat in range(num_repeats):
            tell(f"frames of {frame_mib} MiB, turn {repeat + 1} of {num_repeats}")
            for name, lands, run in ready:
                await run(2 * QUEUE_FRAMES)
                gb_s = num_frames * frame.nbytes / await run(num_frames) / 1e9
                runs.setdefault((name, lands), []).append(gb_s)
    return [
        Rate(
            way=name,
            frame_mib=frame_mib,
            lands=lands,
            median_gb_s=round(statistics.median(all_runs), 3),
            best_gb_s=round(max(all_runs), 3),
            runs_gb_s=tuple(round(x, 3) for x in all_runs),
        )
        for (name, lands), all_runs in runs.items()
    ]


def bars_of(rates: list[Rate]) -> list[Bar]:
    size = max(r.frame_mib for r in rates)
    largest = {(r.way, r.lands): r for r in rates if r.frame_mib == size}
    found = []
    for way, over, at_least in BARS:
        floor = largest[over, True]
        for lands in (False, True):
            rate = largest[way, lands]
            ratio = round(rate.median_gb_s / floor.median_gb_s, 3)
            best = round(rate.best_gb_s / floor.best_gb_s, 3)
            found.append(Bar(way, over, lands, ratio, best, at_least))
    return found


def checksum_rates(num_repeats: int) -> dict[str, float]:
    """GB/s over 16 MiB; each frame is checked once by either side."""
    frame = source(max(FRAME_MIB) * 2**20).data
    found = {}
    checks: dict[str, Callable[[memoryview], int]] = {
        "crc32": zlib.crc32,
        "xxh3_64": xxhash.xxh3_64_intdigest,
    }
    for name, check in checks.items():
        times = []
        for _ in range(5 * num_repeats):
            began = time.perf_counter()
            check(frame)
            times.append(time.perf_counter() - began)
        found[name] = round(frame.nbytes / statistics.median(times) / 1e9, 2)
    return found


def sizes_of(result: Result) -> list[int]:
    return sorted({rate.frame_mib for rate in result.rates})


def table_of(result: Result) -> Table:
    table = Table(title="GB/s of payload: median (fastest)", title_justify="left")
    table.add_column("way")
    table.add_column("")
    for mib in sizes_of(result):
        table.add_column(f"{mib} MiB", justify="right")
    by_way: dict[tuple[str, bool], list[Rate]] = {}
    for rate in result.rates:
        by_way.setdefault((rate.way, rate.lands), []).append(rate)
    for (way, lands), rates in by_way.items():
        cells = [f"{rate.median_gb_s:.2f} ({rate.best_gb_s:.2f})" for rate in rates]
        table.add_row(way, "landed" if lands else "arrived", *cells)
    return table


def page_of(result: Result) -> str:
    """Markdown; the JSON beside it has every run."""
    sizes = [f"{mib} MiB" for mib in sizes_of(result)]
    hardware = result.provenance.hardware
    lines = [
        "# KV frames between two processes of one host",
        "",
        f"{hardware.num_cpus} x {hardware.cpu}, {result.measured_at}, commit "
        f"{result.provenance.commit[:12] or 'unknown'}; {result.mib_per_run} MiB a run. GB/s of "
        "payload, median (fastest) of all runs.",
        "",
        f"| way | frame | {' | '.join(sizes)} |",
        f"|---|---|{'---:|' * len(sizes)}",
    ]
    by_way: dict[tuple[str, bool], list[Rate]] = {}
    for rate in result.rates:
        by_way.setdefault((rate.way, rate.lands), []).append(rate)
    for (way, lands), rates in by_way.items():
        cells = [f"{rate.median_gb_s:.2f} ({rate.best_gb_s:.2f})" for rate in rates]
        lines.append(f"| {way} | {'landed' if lands else 'arrived'} | {' | '.join(cells)} |")
    lines += ["", f"At {max(sizes_of(result))} MiB:", ""]
    lines += [f"- {said_of(bar)}" for bar in result.bars]
    lines += ["", "Checksums, GB/s: "]
    lines[-1] += ", ".join(f"{name} {rate:.1f}" for name, rate in result.checksum_gb_s.items())
    return "\n".join([*lines, ""])


def said_of(bar: Bar) -> str:
    how = "landed" if bar.lands else "arrived"
    verdict = "met" if bar.ratio >= bar.at_least else "missed"
    return (
        f"{bar.way} ({how}) / {bar.over}: {bar.ratio:.2f} (fastest runs {bar.best_ratio:.2f}), "
        f"at least {bar.at_least} {verdict}"
    )


@click.group(invoke_without_command=True)
@click.option("--mib", default=512, help="Of payload in a run.")
@click.option("--repeats", default=15, help="Runs of each way and frame size, turn by turn.")
@click.option(
    "--frame-mib", multiple=True, type=click.IntRange(1, 64), default=FRAME_MIB, show_default=True
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=RESULTS, help="Folder of the result."
)
@click.option("--enforce", is_flag=True, help="Exit with 1 when a bar is missed.")
@click.pass_context
def main(
    context: click.Context,
    mib: int,
    repeats: int,
    frame_mib: tuple[int, ...],
    out: Path,
    enforce: bool,
) -> None:
    """Measure every transport, and print and store what came of it."""
    if context.invoked_subcommand:
        return
    console = Console()
    rates = [
        rate
        for size in sorted(frame_mib)
        for rate in asyncio.run(measure(mib, repeats, size, console.print))
    ]
    result = Result(
        theme="kv-transport",
        measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        provenance=provenance(),
        mib_per_run=mib,
        rates=tuple(rates),
        bars=tuple(bars_of(rates)),
        checksum_gb_s=checksum_rates(repeats),
    )
    console.print(table_of(result))
    for bar in result.bars:
        console.print(said_of(bar))
    console.print(f"checksums, GB/s: {result.checksum_gb_s}")
    month = result.measured_at[:7].replace("-", "")
    stem = out / f"kv-transport_{slug(result.provenance.hardware)}_{month}"
    out.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_bytes(
        msgspec.json.format(msgspec.json.encode(result), indent=1)
    )
    stem.with_suffix(".md").write_text(page_of(result))
    console.print(f"wrote {stem.with_suffix('.json').name} and {stem.with_suffix('.md').name}")
    if enforce and any(bar.ratio < bar.at_least for bar in result.bars if not bar.lands):
        raise SystemExit(1)


@main.command("receive", hidden=True)
@click.argument("kind")
@click.option("--lands", is_flag=True)
def receive(kind: str, lands: bool) -> None:
    asyncio.run(_receive(kind, lands))


@main.command("receive-by-socket", hidden=True)
def receive_by_socket() -> None:
    _receive_by_socket()


if __name__ == "__main__":
    main()
