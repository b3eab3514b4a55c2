"""What one scheduling step costs: ``schedule`` and ``complete``, without an engine.

Each cell keeps so many sequences running and so many waiting. Sequences end at different
times, waiting ones take their seats and blocks, and as many new ones arrive: admission, prefix
lookup, growth over block borders and the end of a sequence are all part of what is timed.
Times are of the processor that runs the scheduler's one thread, so that waiting for neighbours
on the machine does not count. What they take of caches still would: each cell is run several
times, which are alike to the last token, and of each step the fastest time counts.
"""

from __future__ import annotations

import datetime
import gc
import random
import time
from collections.abc import Callable
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from baton.engine.block_pool import BlockPool
from baton.engine.plan import SampledToken, StepPlan, StepResult
from baton.engine.scheduler import Scheduler, SchedulerCounts, Sequence
from baton.protocol.config import EngineConfig
from baton.protocol.sampling import SamplingParams
from benchmarks.provenance import Provenance, provenance, slug

RESULTS = Path(__file__).resolve().parent / "results"
RUNNING = (64, 128, 256, 512, 1_024)
WAITING = (0, 100, 1_000, 10_000)
BLOCK_SIZE = 16
SEED = 20_261_121
LIMIT_MS = 5.0
MAX_WARM_UP_STEPS = 400


class Settings(msgspec.Struct, frozen=True):
    """Lengths are drawn evenly between their two ends; ``num_shared`` first tokens of each
    prompt are one of ten system prompts."""

    num_steps: int
    num_repeats: int = 1
    prompt_tokens: tuple[int, int] = (64, 448)
    num_shared: int = 64
    output_tokens: tuple[int, int] = (16, 240)
    block_size: int = BLOCK_SIZE
    seed: int = SEED


class Cell(msgspec.Struct, frozen=True):
    """Milliseconds of a step, and what happened in the steps that were timed."""

    num_running: int
    num_waiting: int
    median_ms: float
    p99_ms: float
    max_ms: float
    mean_running: float
    num_finished: int
    num_chunks: int
    cache_hit_rate: float


class Result(msgspec.Struct, frozen=True):
    theme: str
    measured_at: str
    settings: Settings
    provenance: Provenance
    cells: tuple[Cell, ...]


class Load:
    """One scheduler under steady churn; ``step`` runs one step and returns its seconds."""

    def __init__(self, num_running: int, num_waiting: int, settings: Settings) -> None:
        self._random = random.Random(settings.seed)
        self._settings = settings
        self._num_open = num_running + num_waiting
        longest = settings.prompt_tokens[1] + settings.output_tokens[1]
        num_blocks = num_running * -(-longest // BLOCK_SIZE)
        config = EngineConfig(
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            max_num_seqs=num_running,
            max_num_batched_tokens=num_running + 2_048,
        )
        self.scheduler = Scheduler(BlockPool(num_blocks, BLOCK_SIZE), config, frozenset())
        self._num_added = 0
        self.num_finished = self.num_chunks = 0
        for _ in range(num_running + num_waiting):
            self._add(is_first=True)

    def _add(self, *, is_first: bool = False) -> None:
        """The first ones are somewhere in the middle, so that they end at different times."""
        settings, draw = self._settings, self._random
        kind = draw.randrange(10)
        num_prompt = draw.randint(*settings.prompt_tokens)
        head = range(kind * 1_000, kind * 1_000 + settings.num_shared)
        tail = (draw.randrange(32_000) for _ in range(num_prompt - settings.num_shared))
        num_output = draw.randint(1 if is_first else settings.output_tokens[0], 240)
        sampling = SamplingParams(max_tokens=num_output, ignore_eos=True)
        seq_id = f"request-{self._num_added}/0"
        self._num_added += 1
        self.scheduler.add(Sequence(seq_id, (*head, *tail), [], sampling))

    def step(self) -> float:
        began = time.thread_time()
        plan = self.scheduler.schedule()
        scheduled = time.thread_time() - began
        assert plan is not None
        result = answer(plan)
        began = time.thread_time()
        news = self.scheduler.complete(result)
        seconds = scheduled + time.thread_time() - began
        self.num_chunks += len(plan.chunks)
        self.num_finished += sum(1 for new in news if new.finish_reason)
        while self.scheduler.num_running + self.scheduler.num_waiting < self._num_open:
            self._add()
        return seconds


def answer(plan: StepPlan) -> StepResult:
    """An engine that draws the same token for everybody."""
    sampled = tuple(SampledToken(c.seq_id, 7) for c in plan.chunks if c.samples)
    return StepResult(plan.step, sampled, 0.01)


def measure_cell(num_running: int, num_waiting: int, settings: Settings) -> Cell:
    fastest: list[float] = []
    for _ in range(settings.num_repeats):
        load, before = warmed_up(num_running, num_waiting, settings)
        times = [load.step() for _ in range(settings.num_steps)]
        fastest = [min(pair) for pair in zip(fastest or times, times, strict=True)]
    after = load.scheduler.counts
    queried = after.num_cache_queried_tokens - before.num_cache_queried_tokens
    hits = after.num_cache_hit_tokens - before.num_cache_hit_tokens
    seconds = sorted(fastest)
    return Cell(
        num_running=num_running,
        num_waiting=num_waiting,
        median_ms=1e3 * seconds[len(seconds) // 2],
        p99_ms=1e3 * seconds[len(seconds) * 99 // 100],
        max_ms=1e3 * seconds[-1],
        mean_running=load.num_chunks / settings.num_steps,
        num_finished=load.num_finished,
        num_chunks=load.num_chunks,
        cache_hit_rate=hits / queried if queried else 0.0,
    )


def warmed_up(
    num_running: int, num_waiting: int, settings: Settings
) -> tuple[Load, SchedulerCounts]:
    """With all seats taken, and its counts so far."""
    load = Load(num_running, num_waiting, settings)
    for _ in range(MAX_WARM_UP_STEPS):
        load.step()
        if load.scheduler.num_running == num_running:
            break
    load.num_finished = load.num_chunks = 0
    gc.collect()
    return load, load.scheduler.counts


def measure(settings: Settings, tell: Callable[[str], None]) -> Result:
    cells = []
    for num_running in RUNNING:
        for num_waiting in WAITING:
            tell(f"{num_running} running, {num_waiting} waiting")
            cells.append(measure_cell(num_running, num_waiting, settings))
    now = datetime.datetime.now(datetime.UTC)
    return Result(
        "scheduling", now.isoformat(timespec="seconds"), settings, provenance(), (*cells,)
    )


def table_of(result: Result) -> Table:
    table = Table(title="one scheduling step: median / p99 in ms", title_justify="left")
    table.add_column("running", justify="right")
    for num_waiting in WAITING:
        table.add_column(f"{num_waiting:,} waiting", justify="right")
    table.add_column("µs a running one", justify="right")
    for num_running in RUNNING:
        cells = [c for c in result.cells if c.num_running == num_running]
        times = [f"{c.median_ms:.2f} / {c.p99_ms:.2f}" for c in cells]
        table.add_row(f"{num_running:,}", *times, f"{1e3 * cells[-1].median_ms / num_running:.1f}")
    return table


def write(result: Result, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    month = result.measured_at[:7].replace("-", "")
    path = folder / f"{result.theme}_{slug(result.provenance.hardware)}_{month}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
    return path


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--steps",
    type=click.IntRange(min=10),
    default=300,
    show_default=True,
    help="Timed steps of each cell.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Runs of each cell; of each step the fastest counts.",
)
@click.option(
    "--out",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    help="Folder for the JSON. Default: benchmarks/results.",
)
@click.option(
    "--enforce",
    is_flag=True,
    help=f"Fail when the largest cell's 99th percentile reaches {LIMIT_MS} ms.",
)
def main(steps: int, repeats: int, folder: Path, enforce: bool) -> None:
    """Time the engine's scheduler from 64 to 1,024 running and 0 to 10,000 waiting requests."""
    settings = Settings(num_steps=steps, num_repeats=repeats)
    result = measure(settings, lambda text: click.echo(text, err=True))
    Console(highlight=False).print(table_of(result))
    largest = result.cells[-1]
    click.echo(
        f"{largest.num_running:,} running, {largest.num_waiting:,} waiting: "
        f"{largest.median_ms:.2f} ms, 99 % of the steps under {largest.p99_ms:.2f} ms, "
        f"the longest {largest.max_ms:.2f} ms; the limit is {LIMIT_MS} ms"
    )
    click.echo(f"written: {write(result, folder)}")
    if enforce and largest.p99_ms >= LIMIT_MS:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
