"""``baton calibrate``: the codec profile of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from baton.cli.options import DEFAULT_CALIBRATION_TEXTS


@click.command()
@click.argument("model")
@click.option(
    "--text",
    "sources",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A file or folder of text like that which will be served; may be repeated. "
    "Default: the standard library of this Python.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Default: beside the checkpoint.")
@click.option(
    "--texts",
    "num_texts",
    type=click.IntRange(min=4),
    default=DEFAULT_CALIBRATION_TEXTS,
    show_default=True,
    help="How many to read; a quarter of them is for choosing steps.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Of the KV cache that is served.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, or cuda.")
@click.option("--seed", default=0, show_default=True, help="Which texts, which draws.")
def command(
    model: str,
    sources: tuple[Path, ...],
    out: Path | None,
    num_texts: int,
    dtype: str,
    device: str,
    seed: int,
) -> None:
    """Make the profile that the lossy KV codecs kv1 to kv4 use for MODEL.

    Reads text, measures which directions of keys and values the model's answers depend on, and
    chooses the steps of each level by their cost. Minutes for a small model on a CPU.

    \b
    Examples:
      baton calibrate baton-tiny --out profile.safetensors
      baton calibrate ./my-model --text ./samples --device cuda
    """
    from cluster.calibrate.run import run

    lines = run(model, sources, out, num_texts, dtype, device, seed, click.echo)
    click.echo(lines)
