"""Time to decode-ready by link and choice, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol


class Timed(Protocol):
    @property
    def mbit(self) -> int | None: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def floor(self) -> str: ...

    @property
    def seconds(self) -> Mapping[str, float]: ...


def draw(points: Sequence[Timed], path: Path) -> None:
    """One panel for each length and floor; the controller is the black line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    choices = list(dict.fromkeys(choice for p in points for choice in p.seconds))
    palette = mpl.colormaps["tab20"]
    colours: dict[str, object] = {choice: palette(n) for n, choice in enumerate(choices)}
    colours["auto"] = "black"
    cases = list(dict.fromkeys((p.floor, p.num_tokens) for p in points))
    figure, panels = pyplot.subplots(1, len(cases), figsize=(4.5 * len(cases), 4.5), squeeze=False)
    for panel, (floor, num_tokens) in zip(panels[0], cases, strict=True):
        mine = [p for p in points if (p.floor, p.num_tokens) == (floor, num_tokens)]
        places = range(len(mine))
        for choice in mine[0].seconds:
            is_auto = choice == "auto"
            panel.plot(
                places,
                [p.seconds[choice] * 1e3 for p in mine],
                "o-" if is_auto else ".-",
                color=colours[choice],
                linewidth=2.5 if is_auto else 1.0,
                label=choice,
                zorder=3 if is_auto else 2,
            )
        panel.set_xticks(places, ["unpaced" if p.mbit is None else f"{p.mbit}" for p in mine])
        panel.set_yscale("log")
        panel.set_xlabel("Mbit/s")
        panel.set_title(f"{num_tokens} tokens, floor {floor}")
    panels[0][0].set_ylabel("time to decode-ready, ms")
    fullest = max(panels[0], key=lambda panel: len(panel.get_lines()))
    fullest.legend(fontsize="x-small", ncols=2)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
