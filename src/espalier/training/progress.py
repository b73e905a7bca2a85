"""What a person sees while training: a live line on a terminal, plain lines elsewhere.

Both show the step, the loss, the rate in examples and tokens per second, the time left and the
memory in use.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from espalier.training.logs import screen
from espalier.training.memory import in_words

_SECONDS_BETWEEN_LINES = 10.0


def duration(seconds: float) -> str:
    """Seconds as text, like 45 s, 3 min 05 s or 2 h 10 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def in_line(metrics: Mapping[str, Any]) -> str:
    """Metrics as text, like loss 0.412 · accuracy 0.873."""
    return " · ".join(
        f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, int | float)
    )


class Screen:
    """Prints a run's course to the screen; silent when `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(file=screen(), quiet=quiet, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._shown = 0.0
        self._rates: list[tuple[float, int, int]] = []

    def say(self, text: str) -> None:
        """Print a line (rich markup is not read)."""
        self.console.print(text, markup=False)

    def start(self, total: int, done: int) -> None:
        """Begin with `done` of `total` steps behind."""
        self._rates, self._shown = [], time.monotonic()
        if self.console.is_terminal and not self.console.quiet:
            bar = Progress(
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[words]}"),
                console=self.console,
                transient=True,
            )
            self._task = bar.add_task("", total=total, completed=done, words="")
            bar.start()
            self._bar = bar

    def step(
        self,
        step: int,
        total: int,
        loss: float,
        seconds: float,
        rows: int,
        tokens: int,
        memory: int,
    ) -> None:
        """Show one step that took `seconds` for `rows` examples of `tokens` tokens together."""
        self._rates = [*self._rates[-19:], (seconds, rows, tokens)]
        spent = sum(r[0] for r in self._rates) or 1e-9
        left = (total - step) * spent / len(self._rates)
        words = (
            f"loss {loss:.4f} · {sum(r[1] for r in self._rates) / spent:.3g} examples/s · "
            f"{sum(r[2] for r in self._rates) / spent:,.0f} tokens/s · "
            f"{duration(left)} left · {in_words(memory)}"
        )
        if self._bar:
            self._bar.update(self._task, completed=step, words=words)
        elif time.monotonic() - self._shown > _SECONDS_BETWEEN_LINES or step in (1, total):
            self._shown = time.monotonic()
            self.say(f"step {step}/{total} · {words}")

    def checked(self, step: int, metrics: Mapping[str, Any], best: str | None) -> None:
        """Show an evaluation; `best` is the metric that makes it the best so far, if it is."""
        star = f"  ← best so far, by {best}" if best else ""
        self.say(f"step {step} · validation: {in_line(metrics)}{star}")

    def stop(self) -> None:
        """Take the live line away."""
        if self._bar:
            self._bar.stop()
            self._bar = None
