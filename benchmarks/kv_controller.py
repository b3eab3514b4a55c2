"""The codec controller beside every fixed choice, on links of many rates and on one that drops.

    python -m benchmarks.kv_controller

Real KV of baton-tiny, real codecs, the product's pusher and receiver in two processes, and real
TCP through the kernel's token bucket (root, for a network namespace). Choices take turns, so that
whatever else the machine does falls on all of them; times are medians.
"""

from __future__ import annotations

import asyncio
import datetime
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from baton.checkpoint.find import TOKENIZER_FILE, resolve
from benchmarks.kv import controller_plot
from benchmarks.kv.contexts import token_rows
from benchmarks.kv.near_end import Fixed, NearEnd
from benchmarks.kv.prompt_kv import ALL_BLOCKS, compute, load
from benchmarks.kv.shaped_link import ShapedLink, shaped_link
from benchmarks.kv.simulation import outages
from benchmarks.provenance import Provenance, provenance, slug
from kv_transfer.codecs.contract import Quality
from kv_transfer.coding import KvCoding
from kv_transfer.controller import RECOMPUTE, CodecController
from kv_transfer.estimates import ComputeEstimate
from kv_transfer.floors import allowed

RESULTS = Path(__file__).parent / "results"
MODEL = "baton-tiny"
MBIT = 125e3
RATES: tuple[int | None, ...] = (50, 200, 1_000, 10_000, None)
"""Mbit/s; None is as fast as it goes."""
LENGTHS = (512, 3_840)
FLOORS = {"low": Quality.LOW, "lossless": Quality.LOSSLESS}
AUTO = "auto"
NUM_SETTLING = 6
"""Hand-overs before the timed ones: a link that was used a little is what is compared."""
SLOW_FIXED_S = 2.0
"""A fixed choice that takes longer is timed three times only: nothing close depends on it."""

SLO_S = 0.4
EVERY_S = 0.5
NUM_TRACE = 80
FAST, SLOW = 1_000 * MBIT, (50 * MBIT, 100 * MBIT)
TRACED = ("raw", "int8", "auto low", "auto high", "auto lossless")


class Point(msgspec.Struct, frozen=True):
    """Medians of seconds, by choice. ratio: of the controller's to the best fixed one's."""

    mbit: int | None
    num_tokens: int
    floor: str
    seconds: dict[str, float]
    best: str
    ratio: float
    chosen: dict[str, int]
    predicted_over_actual: float
    num_repeats: int


class Traced(msgspec.Struct, frozen=True):
    """violations: hand-overs of 3,840 tokens that took longer than ``SLO_S``, of ``count``."""

    choice: str
    count: int
    violations: int
    median_s: float
    worst_s: float


class Result(msgspec.Struct, frozen=True):
    when: str
    provenance: Provenance
    points: list[Point]
    slo_s: float
    trace: list[Traced]


@dataclass(frozen=True, slots=True)
class Bench:
    near: NearEnd
    link: ShapedLink
    qualities: dict[str, Quality]
    compute: ComputeEstimate
    """What computing costs at the moment, as a worker knows it from its own steps."""

    def controller(self) -> CodecController:
        return CodecController(self.qualities, compute=self.compute)

    async def points(self, mbit: int | None, num_tokens: int, num_repeats: int) -> list[Point]:
        self.link.set_rate(None if mbit is None else mbit * MBIT)
        fixed = {name: Fixed(name, self.compute) for name in (*self.qualities, RECOMPUTE)}
        autos = {floor: self.controller() for floor in FLOORS}
        every = tuple(self.qualities)
        seconds: dict[str, list[float]] = {name: [] for name in (*fixed, *FLOORS)}
        for floor, made in autos.items():
            names = allowed(self.qualities, FLOORS[floor])
            for _ in range(NUM_SETTLING):
                await self.near.hand_over(num_tokens, names, made)
            made.num_chosen.clear()
        for repeat in range(num_repeats):
            turns = [*fixed, *FLOORS]
            random.Random(repeat).shuffle(turns)
            for name in turns:
                done = seconds[name]
                if name in FLOORS:
                    names = allowed(self.qualities, FLOORS[name])
                    done.append((await self.near.hand_over(num_tokens, names, autos[name]))[0])
                elif len(done) < 3 or statistics.median(done) < SLOW_FIXED_S:
                    done.append((await self.near.hand_over(num_tokens, every, fixed[name]))[0])
        medians = {name: statistics.median(done) for name, done in seconds.items()}
        return [self._point(mbit, num_tokens, f, medians, autos[f], num_repeats) for f in FLOORS]

    def _point(
        self,
        mbit: int | None,
        num_tokens: int,
        floor: str,
        medians: dict[str, float],
        made: CodecController,
        num_repeats: int,
    ) -> Point:
        names = (*allowed(self.qualities, FLOORS[floor]), RECOMPUTE)
        mine = {name: medians[name] for name in names}
        best = min(mine, key=lambda name: mine[name])
        forecasts = made.forecasts
        return Point(
            mbit=mbit,
            num_tokens=num_tokens,
            floor=floor,
            seconds={**mine, AUTO: medians[floor]},
            best=best,
            ratio=medians[floor] / mine[best],
            chosen=dict(made.num_chosen.most_common()),
            predicted_over_actual=forecasts.predicted_s / max(forecasts.actual_s, 1e-9),
            num_repeats=num_repeats,
        )

    async def traced(self, choice: str, num_hand_overs: int) -> Traced:
        """The same drops for every choice."""
        every = tuple(self.qualities)
        if choice.startswith(AUTO):
            names = allowed(self.qualities, Quality[choice.split()[1].upper()])
            made = self.controller()
        else:
            names, made = every, Fixed(choice, self.compute)
        self.link.set_rate(FAST)
        for _ in range(NUM_SETTLING):
            await self.near.hand_over(LENGTHS[-1], names, made)
        dropping = asyncio.create_task(self._drop(num_hand_overs))
        loop = asyncio.get_running_loop()
        began, done = loop.time(), []
        for number in range(num_hand_overs):
            await asyncio.sleep(max(0.0, began + number * EVERY_S - loop.time()))
            done.append((await self.near.hand_over(LENGTHS[-1], names, made))[0])
        dropping.cancel()
        return Traced(
            choice=choice,
            count=len(done),
            violations=sum(seconds > SLO_S for seconds in done),
            median_s=statistics.median(done),
            worst_s=max(done),
        )

    async def _drop(self, num_hand_overs: int) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        for at, bytes_per_s in outages(FAST, SLOW, num_hand_overs, seed=1).steps:
            await asyncio.sleep(max(0.0, began + at - loop.time()))
            await asyncio.to_thread(self.link.set_rate, bytes_per_s)


async def _run(
    rates: Sequence[int | None], num_repeats: int, num_trace: int, say: Callable[[str], None]
) -> Result:
    folder = resolve(MODEL)
    executor = load(folder)
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    num_tokens = max(LENGTHS)
    first = executor.spec.bos_token_id or 0
    token_ids = tuple(int(t) for t in next(token_rows(tokenizer, first, num_tokens)))
    chunks = compute(executor, token_ids, 0)
    layout, num_layers = executor.layout, executor.layout.num_layers
    group = layout.groups[0]
    shape = (num_layers, 2, num_tokens, group.num_kv_heads, group.head_dim)
    data = executor.read_kv(ALL_BLOCKS, 0, num_tokens, 0, num_layers)
    kv = np.frombuffer(data, np.uint16).reshape(shape)
    coding = KvCoding.of_model(str(folder), layout)
    names = coding.names(AUTO)
    coding.prepare(names)
    await asyncio.to_thread(coding.wait_until_prepared)
    points: list[Point] = []
    trace: list[Traced] = []
    with shaped_link() as link:
        near = NearEnd(coding, layout, kv, token_ids)
        async with near.connected(link, folder):
            estimate = ComputeEstimate()
            for start, stop, seconds in chunks:
                estimate.computed(start, stop, seconds)
            bench = Bench(near, link, dict(coding.qualities(names)), estimate)
            for mbit in rates:
                for length in LENGTHS:
                    points += await bench.points(mbit, length, num_repeats)
                    say(f"{_rate(mbit)}, {length} tokens: done")
            for choice in TRACED if num_trace else ():
                trace.append(await bench.traced(choice, num_trace))
                say(f"dropping link, {choice}: {trace[-1].violations} of {trace[-1].count}")
    coding.close()
    now = datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")
    return Result(now, provenance(), points, SLO_S, trace)


@click.command()
@click.option("--rates", default="50,200,1000,10000,unpaced", help="Mbit/s, by commas.")
@click.option("--repeats", default=20)
@click.option("--trace", default=NUM_TRACE, help="Hand-overs over the link that drops; 0: none.")
@click.option("--out", type=click.Path(path_type=Path), help="The JSON file.")
def main(rates: str, repeats: int, trace: int, out: Path | None) -> None:
    wanted = [None if rate == "unpaced" else int(rate) for rate in rates.split(",")]
    result = asyncio.run(_run(wanted, repeats, trace, click.echo))
    now = datetime.datetime.now(datetime.UTC)
    hardware = result.provenance.hardware
    path = out or RESULTS / f"kv_controller_{slug(hardware)}_{now:%Y%m}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
    controller_plot.draw(result.points, path.with_suffix(".svg"))
    _print(result)


def _print(result: Result) -> None:
    console = Console(width=150)
    for floor in FLOORS:
        mine = [p for p in result.points if p.floor == floor]
        if not mine:
            continue
        choices = list(mine[0].seconds)
        table = Table("link", "tokens", *choices, "of the best", title=f"floor {floor}, ms")
        for p in mine:
            times = [_cell(p, choice) for choice in choices]
            ratio = f"{100 * p.ratio:.0f} % ({p.best})"
            table.add_row(_rate(p.mbit), str(p.num_tokens), *times, ratio)
        console.print(table)
    if result.trace:
        table = Table("choice", f"over {result.slo_s * 1e3:.0f} ms", "median ms", "worst ms")
        for t in result.trace:
            share = f"{t.violations} of {t.count} ({100 * t.violations / t.count:.0f} %)"
            table.add_row(t.choice, share, f"{t.median_s * 1e3:.0f}", f"{t.worst_s * 1e3:.0f}")
        console.print(table)


def _cell(point: Point, choice: str) -> str:
    text = f"{point.seconds[choice] * 1e3:.1f}"
    return f"[bold]{text}[/bold]" if choice in (point.best, AUTO) else text


def _rate(mbit: int | None) -> str:
    return "unpaced" if mbit is None else f"{mbit:,} Mbit/s"


if __name__ == "__main__":
    main()
