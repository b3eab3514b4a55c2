"""How fast each KV codec is on one core, beside zstd -1, lz4 and a copy, on a model's own KV.

    python -m benchmarks.kv_codec_speed

One frame of all layers of a context, as a hand-over has it; rates are raw bytes over the CPU time
of the one thread that codes. Rounds go through all codecs in turn, so that noise of the machine
hits all; the best round counts, since others only ever take time away (the median is in the JSON
too). A codec is timed only after its output was checked.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import lz4.frame
import msgspec
import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from baton.checkpoint.find import TOKENIZER_FILE, resolve
from benchmarks.kv.contexts import token_rows
from benchmarks.provenance import Provenance, provenance, slug
from cluster.calibrate.reader import Reader
from kv_transfer.codecs.contract import Codec, KvPart, Quality
from kv_transfer.codecs.lossy_profile import PROFILE_FILE, load_profile
from kv_transfer.codecs.registry import LOSSY, WITHOUT_PROFILE, make

RESULTS = Path(__file__).resolve().parent / "results"
FOLLOWING = 1
ROUND_S = 0.05
"""At least this long is each measurement of a round."""
BARS_MB_PER_S = {"split": 400, "entropy": 400} | dict.fromkeys(LOSSY, 300)

Array = NDArray[Any]


class Geometry(msgspec.Struct, frozen=True):
    dtype: str
    num_kv_heads: int
    head_dim: int


class Speed(msgspec.Struct, frozen=True):
    """Rates in MB (10**6 bytes) of raw KV a second of CPU time: best round, then the median."""

    codec: str
    dtype: str
    num_tokens: int
    raw_bytes: int
    coded_bytes: int
    encode_mb_per_s: float
    decode_mb_per_s: float
    encode_median_mb_per_s: float
    decode_median_mb_per_s: float

    @property
    def ratio(self) -> float:
        return self.raw_bytes / self.coded_bytes


class Result(msgspec.Struct, frozen=True):
    measured_at: str
    provenance: Provenance
    model: str
    num_rounds: int
    speeds: list[Speed]


class Subject:
    """What is timed: ``encode()`` makes the bytes that ``decode()`` takes."""

    def __init__(
        self, name: str, raw_bytes: int, encode: Callable[[], Any], decode: Callable[[], object]
    ) -> None:
        self.name = name
        self.raw_bytes = raw_bytes
        self.encode = encode
        self.decode = decode
        self.seconds: dict[str, list[float]] = {"encode": [], "decode": []}

    def run_round(self) -> None:
        self.seconds["encode"].append(seconds_of(self.encode))
        self.seconds["decode"].append(seconds_of(self.decode))

    def rates(self, way: str) -> tuple[float, float]:
        """(best, median)."""
        times = self.seconds[way]
        return self._rate(min(times)), self._rate(statistics.median(times))

    def _rate(self, seconds: float) -> float:
        return round(self.raw_bytes / seconds / 1e6, 1)


def seconds_of(run: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    calls, spent = 0, 0.0
    while spent < ROUND_S:
        begin = time.thread_time()
        run()
        spent += time.thread_time() - begin
        calls += 1
    return spent / calls


def of_codec(codec: Codec, kv: Array, part: KvPart) -> tuple[Subject, int]:
    """(the subject, coded bytes)."""
    stream, out = codec.encode(kv, part), np.empty_like(kv)
    codec.decode(stream, part, out)
    assert codec.quality != Quality.EXACT or out.tobytes() == kv.tobytes(), codec.name
    subject = Subject(
        codec.name,
        kv.nbytes,
        lambda: codec.encode(kv, part),
        lambda: codec.decode(stream, part, out),
    )
    return subject, len(stream)


def of_others(kv: Array) -> list[tuple[Subject, int]]:
    raw, out = kv.tobytes(), bytearray(kv.nbytes)
    into = memoryview(out)
    packer, unpacker = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    by_zstd, by_lz4 = packer.compress(raw), lz4.frame.compress(raw)

    def copy() -> None:
        into[:] = raw

    return [
        (
            Subject(
                "zstd -1",
                len(raw),
                lambda: packer.compress(raw),
                lambda: unpacker.decompress(by_zstd),
            ),
            len(by_zstd),
        ),
        (
            Subject(
                "lz4",
                len(raw),
                lambda: lz4.frame.compress(raw),
                lambda: lz4.frame.decompress(by_lz4),
            ),
            len(by_lz4),
        ),
        (Subject("copy", len(raw), copy, copy), len(raw)),
    ]


def kv_of(folder: Path, dtype: str, num_tokens: int) -> Array:
    """Of the first file of the manifest."""
    reader = Reader(folder, dtype, torch.device("cpu"))
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    first = reader.spec.bos_token_id or 0
    tokens = next(token_rows(tokenizer, first, num_tokens + FOLLOWING + 1))
    kv = reader.read(tokens, FOLLOWING).kv.to(getattr(torch, dtype)).contiguous()
    if dtype == "float32":
        return kv.numpy()
    return kv.view(torch.int16).numpy().view(np.uint16)


def measured(folder: Path, dtype: str, num_tokens: int, num_rounds: int) -> list[Speed]:
    kv = kv_of(folder, dtype, num_tokens)
    part, geometry = KvPart(0, 0, num_tokens), Geometry(dtype, *kv.shape[3:])
    profile = load_profile(folder / PROFILE_FILE)
    names = (*WITHOUT_PROFILE, *LOSSY)
    subjects = [
        of_codec(make(name, geometry, profile=profile), kv, part) for name in names
    ] + of_others(kv)
    for _ in range(num_rounds):
        for subject, _ in subjects:
            subject.run_round()
    return [
        Speed(
            subject.name,
            dtype,
            num_tokens,
            subject.raw_bytes,
            coded_bytes,
            *(subject.rates(way)[place] for place in (0, 1) for way in ("encode", "decode")),
        )
        for subject, coded_bytes in subjects
    ]


def table_of(speeds: list[Speed]) -> Table:
    first = speeds[0]
    table = Table(title=f"{first.num_tokens} tokens of {first.dtype}, one core")
    table.add_column("codec")
    for column in ("raw / coded", "bits/element", "encode MB/s", "decode MB/s", "bar MB/s"):
        table.add_column(column, justify="right")
    bits = 32 if first.dtype == "float32" else 16
    for s in speeds:
        bar = BARS_MB_PER_S.get(s.codec)
        met = bar is not None and min(s.encode_mb_per_s, s.decode_mb_per_s) >= bar
        table.add_row(
            s.codec,
            f"{s.ratio:.3f}",
            f"{bits / s.ratio:.2f}",
            f"{s.encode_mb_per_s:,.0f}",
            f"{s.decode_mb_per_s:,.0f}",
            "" if bar is None else f"{bar} {'met' if met else 'MISSED'}",
        )
    return table


@click.command(help=__doc__)
@click.option("--model", default="baton-tiny", show_default=True)
@click.option("--dtype", "dtypes", multiple=True, default=("bfloat16", "float16", "float32"))
@click.option("--tokens", "lengths", multiple=True, default=(256, 1536), type=int)
@click.option("--rounds", "num_rounds", default=7, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(
    model: str, dtypes: tuple[str, ...], lengths: tuple[int, ...], num_rounds: int, out: Path
) -> None:
    torch.set_num_threads(1)
    folder, speeds = resolve(model), list[Speed]()
    for dtype in dtypes:
        for num_tokens in lengths:
            found = measured(folder, dtype, num_tokens, num_rounds)
            Console(width=100).print(table_of(found))
            speeds += found
    now = datetime.datetime.now(datetime.UTC)
    origin = provenance()
    result = Result(now.isoformat(timespec="seconds"), origin, model, num_rounds, speeds)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"kv_codec_speed_{slug(origin.hardware)}_{now:%Y%m}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    click.echo(f"wrote {path.name}")


if __name__ == "__main__":
    main()
