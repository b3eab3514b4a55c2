"""The fronts as a picture: size on the wire against what it does to perplexity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.kv.summary import Row


def draw(rows: Sequence[Row], families: Mapping[str, str], path: Path) -> None:
    """One panel per length. families: of each method."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    lengths = sorted({row.num_tokens for row in rows})
    figure, panels = pyplot.subplots(1, len(lengths), figsize=(5 * len(lengths), 4.5), sharey=True)
    for panel, length in zip([panels] if len(lengths) == 1 else panels, lengths, strict=True):
        here = [r for r in rows if r.num_tokens == length and r.method != "raw"]
        for family in dict.fromkeys(families.values()):
            mine = [r for r in here if families[r.method] == family]
            mine.sort(key=lambda r: r.bits)
            if not mine:
                continue
            change = [r.perplexity_percent.mean for r in mine]
            below = [r.perplexity_percent.mean - r.perplexity_percent.low for r in mine]
            above = [r.perplexity_percent.high - r.perplexity_percent.mean for r in mine]
            style = "o" if family == "simple" else "o-"
            panel.errorbar(
                [r.bits for r in mine],
                change,
                yerr=[below, above],
                fmt=style,
                capsize=2,
                label=family,
            )
        panel.axhline(0, color="grey", linewidth=0.5)
        panel.set_xscale("log")
        panel.set_yscale("symlog", linthresh=0.5)
        panel.set_xlabel("bits per element on the wire")
        panel.set_title(f"{length} tokens")
    figure.axes[0].set_ylabel("change of perplexity, %")
    figure.axes[0].legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
