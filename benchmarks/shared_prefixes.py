"""From how many rows and tokens on it pays to read a common prefix once for all decodes.

    python -m benchmarks.shared_prefixes

Times one layer of an 8B model both ways, and says next to each whether the engine's rule shares
it. The rule is right where it says so from a ratio of about 1 on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click
import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from baton.engine.kernels.paged_decode_attention import SPLIT_TOKENS
from baton.engine.kernels.registry import kernels_for
from baton.engine.shared_prefixes import prefix_groups
from benchmarks.kernel_cases import REAL, CaseMaker
from benchmarks.kernels import NO_GPU, seconds_of

ROWS = (2, 4, 8, 16, 32, 64)
PREFIXES = (512, 1_024, 2_048, 8_192)


class Comparison(msgspec.Struct, frozen=True):
    """Seconds of one layer. is_ruled_in: the engine would share."""

    num_rows: int
    prefix_len: int
    apart_s: float
    together_s: float
    is_ruled_in: bool


def compared(
    maker: CaseMaker, seconds_of: Callable[[Callable[[], object]], float]
) -> Iterable[Comparison]:
    for num_rows in ROWS:
        for prefix_len in PREFIXES:
            apart, together = (
                seconds_of(maker.shared_prefix(num_rows, prefix_len, is_shared=shared).run)
                for shared in (False, True)
            )
            ruled_in = is_ruled_in(num_rows, prefix_len)
            yield Comparison(num_rows, prefix_len, apart, together, ruled_in)


def is_ruled_in(num_rows: int, prefix_len: int) -> bool:
    """What the engine decides for rows that have this in common, and a block of their own each."""
    tables = np.zeros((num_rows, prefix_len // REAL.block_size + 1), dtype=np.int32)
    tables[:, -1] = range(num_rows)
    lengths = np.full(num_rows, prefix_len + 1)
    return bool(
        prefix_groups(tables, lengths, block_size=REAL.block_size, unit_tokens=SPLIT_TOKENS)
    )


def table_of(comparisons: Iterable[Comparison], title: str) -> Table:
    table = Table(title=title)
    for column in ("rows", "prefix", "apart us", "together us", "ratio", "rule"):
        table.add_column(column, justify="right")
    for c in comparisons:
        table.add_row(
            str(c.num_rows),
            f"{c.prefix_len:,}",
            f"{1e6 * c.apart_s:,.1f}",
            f"{1e6 * c.together_s:,.1f}",
            f"{c.apart_s / c.together_s:.2f}",
            "share" if c.is_ruled_in else "",
        )
    return table


@click.command(help=__doc__)
def main() -> None:
    if not torch.cuda.is_available():
        click.echo(NO_GPU, err=True)
        raise SystemExit(2)
    device = torch.device("cuda")
    torch.manual_seed(0)
    found = compared(CaseMaker(kernels_for(device), device, REAL), seconds_of)
    Console(width=140).print(table_of(found, torch.cuda.get_device_name(device)))


if __name__ == "__main__":
    main()
