"""The quickstarts' pictures; nothing is drawn where matplotlib is missing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.quickstart.report import loss_of

if TYPE_CHECKING:
    from espalier.quickstart.encoder import Comparison

COLORS = ("#c2571a", "#1f5a96", "#2b7a4b", "#7a4b9a")


def encoder_picture(found: Comparison, path: Path) -> None:
    """Accuracy over trained parameters, and the learning curves, as a PNG."""
    from espalier.quickstart.encoder import accuracy_of, margin

    figure = _figure()
    if figure is None:
        return
    left, right = figure.subplots(1, 2)
    for color, run in zip(COLORS, found.runs, strict=False):
        accuracy = accuracy_of(run)
        bar = margin(accuracy, found.tested)
        left.errorbar(run.trained, accuracy, yerr=bar, fmt="o", color=color, capsize=4, ms=8)
        left.annotate(
            run.name,
            (run.trained, accuracy),
            xytext=(-8 if run is found.runs[-1] else 8, 8),
            textcoords="offset points",
            ha="left" if run is not found.runs[-1] else "right",
            color=color,
        )
        right.plot(*loss_of(run), color=color, label=run.name, linewidth=2)
        checks = [line for line in run.history if line["kind"] == "validation"]
        at = [line["step"] for line in checks]
        right.plot(at, [line["loss"] for line in checks], "o", color=color, mfc="white")
    for name, value, line in (
        ("tf-idf", found.tfidf, "--"),
        ("majority", found.majority, ":"),
    ):
        left.axhline(value, color="#888888", linestyle=line, linewidth=1)
        left.text(0.02, value, name, color="#666666", va="bottom", transform=_across(left))
    left.set(xscale="log", xlabel="trained parameters", ylim=(0, None))
    left.set_ylabel(f"accuracy on {found.tested} rows of other modules")
    left.margins(x=0.18)
    right.set(xlabel="step", ylabel="loss (lines: training; circles: validation)")
    right.legend(frameon=False)
    _save(figure, path)


def decoder_picture(steps: list[int], losses: list[float], bars: Any, path: Path) -> None:
    """The learning curve, and bits per character before and after on both kinds, as a PNG.

    Args:
        steps: Step numbers.
        losses: Smoothed training loss at each.
        bars: (kind, before, after) in bits per character.
        path: Where to.
    """
    figure = _figure()
    if figure is None:
        return
    left, right = figure.subplots(1, 2)
    for i, (_, before, after) in enumerate(bars):
        for x, value, color in ((i - 0.19, before, "#b8c4d0"), (i + 0.19, after, COLORS[1])):
            left.bar(x, value, width=0.36, color=color, label=None)
            left.text(x, value, f"{value:.2f}", ha="center", va="bottom")
    left.set_xticks(range(len(bars)), [kind for kind, _, _ in bars])
    left.set(ylabel="bits per character (lower is better)")
    left.legend(["before", "after"], frameon=False)
    left.margins(y=0.2)
    right.plot(steps, losses, color=COLORS[1], linewidth=2)
    right.set(xlabel="step", ylabel="training loss per token")
    _save(figure, path)


def _figure() -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _across(axes: Any) -> Any:
    """Coordinates: across the axes for x, the data's for y."""
    return axes.get_yaxis_transform()


def _save(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, path)
