"""Timing on a busy machine: interleaved rounds, processor time, medians of ratios.

Contenders run one after the other in every round, so that whatever slows the machine slows all of
them; a round gives one ratio per pair, and the median over rounds is what is reported. With one
thread the clock is the process's processor time, which does not run while others have the core.
"""

from __future__ import annotations

import gc
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Step = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Ratio:
    """One contender's time over another's: the median over rounds and the extremes."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{_digits(self.median)} ({_digits(self.low)}–{_digits(self.high)})"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True, slots=True)
class Trial:
    """What is timed, and what puts things back for the next round, untimed.

    Attributes:
        run: The timed work.
        after: Runs after it, untimed.
        times: How often the work is done within one timing (for what is over in microseconds).
    """

    run: Step
    after: Step = lambda: None
    times: int = 1


def clock() -> Callable[[], float]:
    """Processor time for one thread, else wall time."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def interleave(trials: Mapping[str, Trial], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every trial in every round; the order turns from round to round."""
    now = clock()
    seconds: dict[str, list[float]] = {name: [] for name in trials}
    names = list(trials)
    for index in range(warmup + rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            trial = trials[name]
            gc.collect()
            gc.disable()
            start = now()
            for _ in range(trial.times):
                trial.run()
            spent = (now() - start) / trial.times
            gc.enable()
            trial.after()
            if index >= warmup:
                seconds[name].append(spent)
    return seconds


def ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """The ratio of two contenders' times, round by round."""
    each = [a / b for a, b in zip(over, under, strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))


def growth(later: Sequence[float], first: Sequence[float]) -> float:
    """How many times longer it takes later: the quotient of the medians of two runs."""
    return statistics.median(later) / statistics.median(first)


def setting(*more: str) -> dict[str, Any]:
    """What the figures depend on: date, versions (of `more` packages too), processor, threads."""
    packages = ("torch", "transformers", "peft", "safetensors", *more, "espalier")
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        **{name: version(name) if name != "espalier" else _own() for name in packages},
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "clock": "processor time" if torch.get_num_threads() == 1 else "wall time",
    }


def _own() -> str:
    import espalier

    return espalier.__version__


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"model name\s*:\s*(.+)", text)
    has = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in text]
    return f"{name[1] if name else platform.machine()} ({', '.join(has)})"


def write_json(path: Path | None, data: object) -> None:
    """The figures as JSON, if a file was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


class Report:
    """Tables for the screen as they come, and for a markdown file at the end."""

    def __init__(self, title: str, facts: Mapping[str, Any]) -> None:
        told = ", ".join(f"{key} {value}" for key, value in facts.items())
        self.parts = [f"# {title}\n\nMeasured with: {told}."]

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table and keep it."""
        _show(title, columns, rows)
        lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        self.parts.append(f"## {title}\n\n" + "\n".join(lines))

    def write(self, path: Path | None) -> None:
        """Write what was kept, if a file was asked for."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n\n".join(self.parts) + "\n")


def _show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, name in enumerate(columns):
        grid.add_column(name, justify="right" if index else "left", style="" if index else "cyan")
    for row in rows:
        grid.add_row(*row)
    Console(width=max(120, Console().width)).print(grid)
