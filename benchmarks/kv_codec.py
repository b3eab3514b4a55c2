"""Size and quality of every KV codec and of both CacheGen baselines, on text none has seen.

    python -m benchmarks.kv_codec

Contexts are the beginnings of the files in kv/manifest.json; the loss is that of the next 256
tokens. Samples are kept in a file beside the results, so a run that was stopped goes on.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import msgspec
import torch
from rich.console import Console
from rich.table import Table as Printed
from tokenizers import Tokenizer

from baton.checkpoint.find import TOKENIZER_FILE, resolve
from baton.protocol.errors import ConfigError
from benchmarks.kv.contexts import MANIFEST, make_manifest, token_rows
from benchmarks.kv.methods import Method, methods
from benchmarks.kv.plot import draw
from benchmarks.kv.quality import Sample, measure
from benchmarks.kv.summary import Comparison, Row, Table
from benchmarks.provenance import Provenance, provenance, slug
from cluster.calibrate.calibrate import FOLLOWING, LENGTHS
from cluster.calibrate.reader import Reader
from kv_transfer.codecs.lossy_profile import PROFILE_FILE, Profile, load_profile

RESULTS = Path(__file__).resolve().parent / "results"
BAR_TOKENS = 1536


class Result(msgspec.Struct, frozen=True):
    measured_at: str
    provenance: Provenance
    profile_digest: str
    rows: list[Row]
    comparisons: list[Comparison]


@click.command()
@click.option("--model", default="baton-tiny", show_default=True)
@click.option("--profile", "profile_path", type=click.Path(path_type=Path))
@click.option("--contexts", "num_contexts", default=200, show_default=True)
@click.option("--lengths", default=",".join(map(str, LENGTHS)), show_default=True)
@click.option("--only", default="", help="Methods, with commas; default: all.")
@click.option("--samples", "samples_path", type=click.Path(path_type=Path))
@click.option("--write-manifest", is_flag=True, help="Choose the files anew; then end.")
@click.option("--summary", "summary_only", is_flag=True, help="From the samples there are.")
def main(
    model: str,
    profile_path: Path | None,
    num_contexts: int,
    lengths: str,
    only: str,
    samples_path: Path | None,
    write_manifest: bool,
    summary_only: bool,
) -> None:
    """Measure, print the table, write JSON and a plot to benchmarks/results."""
    folder = resolve(model)
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    wanted = [int(n) for n in lengths.split(",")]
    if write_manifest:
        manifest = make_manifest(tokenizer, max(LENGTHS) + FOLLOWING + 1)
        MANIFEST.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=0) + b"\n")
        click.echo(f"{len(manifest.files)} files")
        return
    torch.set_num_threads(1)
    reader = Reader(folder, "bfloat16", torch.device("cpu"))
    profile = load_profile(profile_path or folder / PROFILE_FILE)
    if profile.model_digest != reader.model.digest:
        raise ConfigError("the profile belongs to another checkpoint; see baton calibrate")
    chosen = [
        m
        for m in methods(_Geometry(reader), reader.spec.num_layers, profile)
        if not only or m.name in only.split(",")
    ]
    samples_path = samples_path or RESULTS / "kv_codec_samples.jsonl"
    if not summary_only:
        with samples_path.open("ab") as file:
            for sample in _measure(
                reader, tokenizer, chosen, profile, wanted, num_contexts, _read(samples_path)
            ):
                file.write(msgspec.json.encode(sample) + b"\n")
                file.flush()
    known = {m.name: _identity(m, profile) for m in chosen}
    samples = [
        s
        for s in _read(samples_path)
        if known.get(s.method) == s.identity and s.num_tokens in wanted and s.context < num_contexts
    ]
    _report(samples, chosen, profile)


def _measure(
    reader: Reader,
    tokenizer: Tokenizer,
    chosen: Sequence[Method],
    profile: Profile,
    lengths: Sequence[int],
    num_contexts: int,
    known: Sequence[Sample],
) -> Iterator[Sample]:
    done = {(s.method, s.identity, s.num_tokens, s.context) for s in known}
    first = reader.spec.bos_token_id or 0
    rows = list(token_rows(tokenizer, first, max(lengths) + FOLLOWING + 1))[:num_contexts]
    for length in lengths:
        for number, tokens in enumerate(rows):
            missing = [
                m for m in chosen if (m.name, _identity(m, profile), length, number) not in done
            ]
            if not missing:
                continue
            context = reader.read(tokens[: length + FOLLOWING + 1], FOLLOWING)
            for method in missing:
                yield measure(reader, context, number, method, _identity(method, profile))


def _identity(method: Method, profile: Profile) -> str:
    """What a sample depends on beside the method's name."""
    return profile.digest().hex() if method.family == "kv" else ""


def _read(path: Path) -> list[Sample]:
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines()
    return [msgspec.json.decode(line, type=Sample) for line in lines if line]


def _report(samples: Sequence[Sample], chosen: Sequence[Method], profile: Profile) -> None:
    families = {m.name: m.family for m in chosen}
    rows: list[Row] = []
    comparisons: list[Comparison] = []
    for length in sorted({s.num_tokens for s in samples}):
        table = Table(samples, length)
        rows += [table.row(m) for m in table.methods]
        for name in (m for m in table.methods if families[m] == "kv"):
            for baseline in ("published", "shipped"):
                front = [m for m in table.methods if families[m] == baseline]
                if front:
                    comparisons.append(table.compare(name, baseline, front))
    origin = provenance()
    now = datetime.datetime.now(datetime.UTC)
    result = Result(
        now.isoformat("T", "seconds"), origin, profile.digest().hex(), rows, comparisons
    )
    path = RESULTS / f"kv_codec_{slug(origin.hardware)}_{now:%Y%m}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
    draw(rows, families, path.with_suffix(".svg"))
    _print(rows, comparisons)


def _print(rows: Sequence[Row], comparisons: Sequence[Comparison]) -> None:
    table = Printed("tokens", "method", "bits", "without tables", "perplexity %", "nats", "top-1 %")
    for row in sorted(rows, key=lambda r: (r.num_tokens, -r.bits)):
        change, same = row.perplexity_percent, row.agreement
        table.add_row(
            str(row.num_tokens),
            row.method,
            f"{row.bits:.3f}",
            f"{row.bits_without_tables:.3f}",
            f"{change.mean:+.2f} ({change.low:+.2f} to {change.high:+.2f})",
            f"{row.divergence.mean:.4f}",
            f"{100 * same.mean:.1f}",
        )
    against = Printed("tokens", "method", "baseline", "size at equal perplexity", "tables free")
    for c in comparisons:
        against.add_row(
            str(c.num_tokens),
            c.method,
            c.baseline + (" (its finest is worse)" if c.beyond else ""),
            f"{100 * c.ratio.mean:.1f} % ({100 * c.ratio.low:.1f} to {100 * c.ratio.high:.1f})",
            f"{100 * c.ratio_without_tables:.1f} %",
        )
    console = Console(width=120)
    console.print(table)
    console.print(against)


class _Geometry:
    def __init__(self, reader: Reader) -> None:
        self.dtype = reader.dtype
        self.num_kv_heads = reader.spec.num_kv_heads
        self.head_dim = reader.spec.head_dim


if __name__ == "__main__":
    main()
