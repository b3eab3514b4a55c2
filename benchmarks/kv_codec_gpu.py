"""How fast the KV codecs' kernels are on a GPU, in GB of raw bfloat16 a second.

    python -m benchmarks.kv_codec_gpu

A frame of 2,048 tokens of an 8B model: 32 layers, 8 KV heads of 128. Times are medians of replayed
CUDA graphs with a cold L2 (``benchmarks.kernels``), bytes stay on the GPU. Output is compared with
what went in before anything is timed.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.kernels import NO_GPU, RESULTS, seconds_of
from benchmarks.provenance import Provenance, provenance
from kv_transfer.codecs.float_forms import FORMS
from kv_transfer.codecs.gpu import quantise, rans, split
from kv_transfer.codecs.rans import PROB_SCALE, RansTables, lanes_for, normalise

RUNS, TOKENS, CHANNELS = 64, 2048, 1024
N = TOKENS * CHANNELS
NUM_TABLES, ALPHABET = 64, 32
BARS_GB_PER_S = {"split": 200.0, "rANS of a lossy codec": 50.0}


class Rate(msgspec.Struct, frozen=True):
    """GB (10**9 bytes) of raw bfloat16 a second."""

    codec: str
    encode_gb_per_s: float
    decode_gb_per_s: float


class Result(msgspec.Struct, frozen=True):
    gpu: str
    measured_at: str
    provenance: Provenance
    rates: list[Rate]


def rate(codec: str, encode: Callable[[], object], decode: Callable[[], object]) -> Rate:
    num_bytes = RUNS * N * 2
    each = (round(num_bytes / seconds_of(run) / 1e9, 1) for run in (encode, decode))
    return Rate(codec, *each)


def rates(device: torch.device) -> Iterator[Rate]:
    values = torch.randn((RUNS, TOKENS, CHANNELS), dtype=torch.bfloat16, device=device)
    values *= torch.exp(torch.randn((RUNS, 1, CHANNELS), device=device)).to(torch.bfloat16)
    bits = values.view(torch.int16)
    yield of_split(bits.view(RUNS, N))
    for num_bits in (8, 4):
        yield of_integers(bits, num_bits)
    yield of_rans(device)


def of_split(bits: Tensor) -> Rate:
    form, out = FORMS["bfloat16"], torch.empty_like(bits)
    begins = split.choose_windows(form, bits)
    codes, bodies, escapes, counts = split.pack(form, bits, begins)
    offsets = torch.arange(RUNS, device=bits.device) * N
    arguments = (form, codes, bodies, escapes.view(-1), offsets, counts, begins, out)
    assert bool(split.unpack(*arguments).all())
    assert torch.equal(out, bits)
    return rate(
        "split",
        lambda: split.pack(form, bits, split.choose_windows(form, bits)),
        lambda: split.unpack(*arguments),
    )


def of_integers(bits: Tensor, num_bits: int) -> Rate:
    out = torch.empty_like(bits)
    coded = quantise.quantise(bits, "bfloat16", num_bits)
    return rate(
        f"int{num_bits}",
        lambda: quantise.quantise(bits, "bfloat16", num_bits),
        lambda: quantise.restore(*coded, "bfloat16", out),
    )


def of_rans(device: torch.device) -> Rate:
    """One symbol for each element, tables by channel, as a lossy codec has them."""
    distance = np.abs(np.arange(ALPHABET) - ALPHABET // 2)
    widths = 0.3 * 1.06 ** np.arange(NUM_TABLES)[:, None]
    tables = RansTables(normalise(np.ceil(1e6 * np.exp(-distance / widths))))
    on_device = rans.DeviceTables(tables, device)
    index = torch.randint(0, NUM_TABLES, (RUNS, CHANNELS), dtype=torch.uint8, device=device)
    slots = torch.randint(0, PROB_SCALE, (RUNS, TOKENS, CHANNELS), device=device)
    symbols = on_device.symbol_of[index.long()[:, None].expand_as(slots), slots].view(RUNS, N)
    num_lanes = lanes_for(N)
    words, num_words, states = rans.encode(symbols, index, on_device, num_lanes)
    offsets, out = torch.arange(RUNS, device=device) * N, torch.empty_like(symbols)
    arguments = (words.view(-1), offsets, num_words, states, index, on_device, out)
    assert bool(rans.decode(*arguments).all())
    assert torch.equal(out, symbols)
    return rate(
        "rANS of a lossy codec",
        lambda: rans.encode(symbols, index, on_device, num_lanes),
        lambda: rans.decode(*arguments),
    )


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(out: Path) -> None:
    if not torch.cuda.is_available():
        click.echo(NO_GPU, err=True)
        raise SystemExit(2)
    torch.manual_seed(0)
    gpu = torch.cuda.get_device_name()
    table = Table(title=f"{gpu}: raw bfloat16")
    table.add_column("codec")
    for column in ("encode GB/s", "decode GB/s", "bar GB/s"):
        table.add_column(column, justify="right")
    found = list(rates(torch.device("cuda")))
    for r in found:
        bar = BARS_GB_PER_S.get(r.codec)
        met = bar is not None and min(r.encode_gb_per_s, r.decode_gb_per_s) >= bar
        row = (r.codec, f"{r.encode_gb_per_s:,.0f}", f"{r.decode_gb_per_s:,.0f}")
        table.add_row(*row, "" if bar is None else f"{bar:.0f} {'met' if met else 'MISSED'}")
    Console(width=100).print(table)
    now = datetime.datetime.now(datetime.UTC)
    result = Result(gpu, now.isoformat(timespec="seconds"), provenance(), found)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"kv_codec_gpu_{'-'.join(gpu.lower().split())}_{now:%Y%m}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    click.echo(f"wrote {path.name}")


if __name__ == "__main__":
    main()
