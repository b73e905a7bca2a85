"""The picture of a run: loss and the task's metric over steps, from metrics.jsonl to loss.png."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _smooth(values: Sequence[float], weight: float) -> list[float]:
    out, mean, norm = [], 0.0, 0.0
    for value in values:
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(mean / norm)
    return out


def draw(history: Sequence[dict[str, Any]], metric: str, path: Path) -> None:
    """Write the loss per step, smoothed, with validation loss and `metric` beside, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [line for line in history if line["kind"] == "train"]
    checks = [line for line in history if line["kind"] == "validation"]
    scored = [line for line in checks if metric in line and metric != "loss"]
    figure = Figure(figsize=(9 if scored else 6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    losses = [line["loss"] for line in steps]
    x = [line["step"] for line in steps]
    axes[0].plot(x, losses, color="#c9d6e3", linewidth=1, label="each step")
    axes[0].plot(x, _smooth(losses, 0.9), color="#1f5a96", label="training")
    if checks:
        at = [line["step"] for line in checks]
        axes[0].plot(
            at, [line["loss"] for line in checks], "o-", color="#c2571a", label="validation"
        )
    axes[0].set(xlabel="step", ylabel="loss")
    axes[0].legend()
    if scored:
        axes[1].plot(
            [c["step"] for c in scored], [c[metric] for c in scored], "o-", color="#2b7a4b"
        )
        axes[1].set(xlabel="step", ylabel=f"validation {metric}")
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)
