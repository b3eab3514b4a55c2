"""How near each kernel of the engine comes to what the GPU can do.

    python -m benchmarks.kernels

A kernel's floor is the longer of two times: the fewest bytes it must move over the copy bandwidth
of this GPU, and its operations over its matrix rate; both rates are measured here, in the same
run. Times are medians of replayed CUDA graphs with a cold L2, so launches do not count.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from unittest.mock import patch

import click
import msgspec
import torch
from rich.console import Console
from rich.table import Table

from baton.engine.kernels import paged_decode_attention, paged_prefill_attention
from baton.engine.kernels.registry import kernels_for
from benchmarks.kernel_cases import REAL, Case, CaseMaker
from benchmarks.provenance import Provenance, provenance

RESULTS = Path(__file__).resolve().parent / "results"
NO_GPU = "No CUDA device here: these kernels can be timed on a GPU only."
COPY_BYTES = 2**31
MATMUL_SIDE = 8192

PREFILL_TILES = (
    (128, 64, 8, 5),
    (128, 128, 8, 5),
    (128, 128, 8, 3),
    (128, 64, 8, 3),
    (64, 64, 4, 5),
)
DECODE_TILES = ((64, 4, 5), (64, 4, 3), (32, 4, 5), (128, 4, 3), (128, 8, 5))


class Rates(msgspec.Struct, frozen=True):
    """Measured: bytes read plus bytes written per second of a copy; bfloat16 operations per
    second of a product of two square matrices of random numbers."""

    copy_bytes_per_s: float
    matmul_flops_per_s: float


class Timing(msgspec.Struct, frozen=True):
    """share: floor over time. bound: which of the two makes the floor."""

    name: str
    shape: str
    micros: float
    floor_micros: float
    share: float
    bound: str
    target: float | None


class Report(msgspec.Struct, frozen=True):
    gpu: str
    made: str
    rates: Rates
    timings: list[Timing]
    provenance: Provenance


def rated(case: Case, seconds: float, rates: Rates) -> Timing:
    bytes_s = case.num_bytes / rates.copy_bytes_per_s
    flops_s = case.num_flops / rates.matmul_flops_per_s
    floor_s = max(bytes_s, flops_s)
    return Timing(
        name=case.name,
        shape=case.shape,
        micros=round(seconds * 1e6, 1),
        floor_micros=round(floor_s * 1e6, 1),
        share=round(floor_s / seconds, 3),
        bound="bytes" if bytes_s >= flops_s else "flops",
        target=case.target,
    )


def table_of(timings: Iterable[Timing], title: str) -> Table:
    table = Table(title=title)
    table.add_column("operation")
    table.add_column("shape")
    for column in ("time us", "floor us", "of floor", "bound", "target"):
        table.add_column(column, justify="right")
    for t in timings:
        target = ""
        if t.target is not None:
            target = f"{t.target:.0%} {'met' if t.share >= t.target else 'MISSED'}"
        table.add_row(
            t.name,
            t.shape,
            f"{t.micros:,.1f}",
            f"{t.floor_micros:,.1f}",
            f"{t.share:.0%}",
            t.bound,
            target,
        )
    return table


def seconds_of(run: Callable[[], object]) -> float:
    """Median of one call's time on the GPU."""
    from triton.testing import do_bench

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    milliseconds: float = do_bench(graph.replay, warmup=50, rep=300, return_mode="median")
    return milliseconds / 1e3


def measured_rates(device: torch.device) -> Rates:
    copy_s, matmul_s = _copy_seconds(device), _matmul_seconds(device)
    return Rates(2 * COPY_BYTES / copy_s, 2 * MATMUL_SIDE**3 / matmul_s)


def _copy_seconds(device: torch.device) -> float:
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return seconds_of(lambda: target.copy_(source))


def _matmul_seconds(device: torch.device) -> float:
    a, b = torch.randn(2, MATMUL_SIDE, MATMUL_SIDE, dtype=torch.bfloat16, device=device)
    return seconds_of(lambda: a @ b)


def timed(cases: Iterable[Case], rates: Rates, only: Sequence[str]) -> list[Timing]:
    timings = []
    for case in cases:
        if not only or case.name in only:
            timings.append(rated(case, seconds_of(case.run), rates))
    return timings


def swept(maker: CaseMaker, rates: Rates) -> list[Timing]:
    """Other tiles of the two kernels that have a target, each in the shape's column."""
    timings = []
    for shape in PREFILL_TILES:
        tile = paged_prefill_attention.Tile(*shape)
        with patch.object(paged_prefill_attention, "HALF_TILE", tile):
            case = maker.prefill(REAL.context, REAL.context, target=0.45)
            timings.append(rated(_named(case, str(tile)), seconds_of(case.run), rates))
    for keys, num_warps, num_stages in DECODE_TILES:
        label = f"keys={keys}, num_warps={num_warps}, num_stages={num_stages}"
        with patch.multiple(
            paged_decode_attention, BLOCK_N=keys, NUM_WARPS=num_warps, NUM_STAGES=num_stages
        ):
            case = maker.decode(REAL.batch, REAL.context, target=0.8)
            timings.append(rated(_named(case, label), seconds_of(case.run), rates))
    return timings


def _named(case: Case, shape: str) -> Case:
    return Case(case.name, shape, case.run, case.num_bytes, case.num_flops, case.target)


@click.command(help=__doc__)
@click.option("--only", multiple=True, help="Time this operation alone; may be repeated.")
@click.option("--sweep", is_flag=True, help="Time other tiles of prefill and decode attention.")
@click.option("--enforce", is_flag=True, help="Exit with 1 when a target is missed.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(only: tuple[str, ...], sweep: bool, enforce: bool, out: Path) -> None:
    if not torch.cuda.is_available():
        click.echo(NO_GPU, err=True)
        raise SystemExit(2)
    device = torch.device("cuda")
    gpu = torch.cuda.get_device_name(device)
    torch.manual_seed(0)
    rates = measured_rates(device)
    maker = CaseMaker(kernels_for(device), device, REAL)
    timings = swept(maker, rates) if sweep else timed(maker.all(), rates, only)
    report = Report(
        gpu=gpu,
        made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        rates=rates,
        timings=timings,
        provenance=provenance(),
    )
    title = (
        f"{gpu}: copy {rates.copy_bytes_per_s / 1e12:.2f} TB/s, "
        f"bfloat16 products {rates.matmul_flops_per_s / 1e12:.0f} TFLOP/s"
    )
    Console(width=140).print(table_of(timings, title))
    out.mkdir(parents=True, exist_ok=True)
    words = "-".join(gpu.lower().split())
    kind = "tiles" if sweep else "kernels"
    path = out / f"{kind}_{words}_{datetime.datetime.now(datetime.UTC):%Y%m}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    click.echo(f"wrote {path}")
    if enforce and any(t.target is not None and t.share < t.target for t in timings):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
