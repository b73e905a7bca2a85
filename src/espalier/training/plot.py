"""The pictures of a run, from metrics.jsonl.

loss.png has loss and the task's metric over steps. Where a method told of each place while it
trained, a picture with the name of what it told (rank.png) has it by layer and role over steps.
"""

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
    steps = [line for line in history if line["kind"] == "train"]
    checks = [line for line in history if line["kind"] == "validation"]
    scored = [line for line in checks if metric in line and metric != "loss"]
    figure = empty(9 if scored else 6, 4)
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
    write(figure, path)


def draw_places(history: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Write what was told of each place over time, one picture for each kind of number."""
    lines = [line for line in history if line["kind"] == "places"]
    names = dict.fromkeys(key for line in lines for key in line if isinstance(line[key], list))
    return [_draw_place(name, lines, folder / f"{name}.png") for name in names]


def _draw_place(name: str, lines: Sequence[dict[str, Any]], path: Path) -> Path:
    """One panel per stack and role: steps from left to right, layers upwards, numbers as shades."""
    told = [line for line in lines if name in line]
    panels = list(dict.fromkeys((stack, role) for stack, _, role, _ in told[-1][name]))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = empty(3 * columns + 1, 2.2 * rows + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    top = max(number for line in told for *_, number in line[name])
    several = len({stack for stack, _ in panels}) > 1
    shades = None
    for at, (stack, role) in zip(axes, panels, strict=False):
        layers, table = _table(told, name, stack, role)
        shades = at.imshow(table, aspect="auto", origin="lower", vmin=0, vmax=top or 1)
        at.set_title(f"{stack} {role}" if several else role, fontsize="small")
        some = range(0, len(layers), max(1, len(layers) // 8))
        at.set_yticks(some, ["" if layers[i] is None else str(layers[i]) for i in some])
        few = range(0, len(told), max(1, len(told) // 4))
        at.set_xticks(few, [str(told[i]["step"]) for i in few])
        at.tick_params(labelsize="x-small")
    for at in axes[len(panels) :]:
        at.set_axis_off()
    figure.supxlabel("step", fontsize="small")
    figure.supylabel("layer", fontsize="small")
    figure.colorbar(shades, ax=list(axes), label=name)  # pyright: ignore[reportArgumentType]
    write(figure, path)
    return path


def _table(
    told: Sequence[dict[str, Any]], name: str, stack: str, role: str
) -> tuple[list[int | None], list[list[float]]]:
    """The layers of a role, and the numbers of each over time; the mean where it has several."""
    here = [[(at, n) for s, at, r, n in line[name] if (s, r) == (stack, role)] for line in told]
    layers = list(dict.fromkeys(layer for layer, _ in here[0]))
    numbers = [[[n for at, n in line if at == layer] for line in here] for layer in layers]
    return layers, [[sum(some) / len(some) for some in over] for over in numbers]


def empty(width: float, height: float) -> Any:
    """A figure of this size in inches that no window shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write(figure: Any, path: Path) -> None:
    """Write a figure as a PNG, whole or not at all."""
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)
