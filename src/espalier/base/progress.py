"""Progress of a long build: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from espalier.base.train import TrainSettings

PLAIN_SECONDS = 30.0


class Progress:
    """Shows steps done, smoothed loss, tokens per second and time left."""

    def __init__(self, settings: TrainSettings, corpus_tokens: int) -> None:
        """Prepare; nothing is printed before the context is entered."""
        self.settings, self.corpus_tokens = settings, corpus_tokens
        self.console = Console(stderr=True)
        self.loss: float | None = None
        self.first: int | None = None
        self.started = self.printed = time.monotonic()
        self.bar: Bar | None = None
        self.task = TaskID(0)

    def __enter__(self) -> Progress:
        """Say how much there is to do and, on a terminal, start the bar."""
        settings = self.settings
        seen = settings.steps * settings.batch * settings.block / max(1, self.corpus_tokens)
        self.console.print(
            f"{self.corpus_tokens:,} tokens of text; {settings.steps:,} steps, "
            f"{seen:.1f} times over the text",
            highlight=False,
        )
        if self.console.is_terminal:
            columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self.bar = Bar(*columns, console=self.console)
            self.task = self.bar.add_task("", total=settings.steps)
            self.bar.start()
        self.started = self.printed = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the bar, so that a traceback or the next line prints cleanly."""
        if self.bar:
            self.bar.stop()

    def step(self, done: int, loss: float, rate: float) -> None:
        """Take note of one step; the loss is smoothed over about fifty."""
        self.loss = loss if self.loss is None else 0.98 * self.loss + 0.02 * loss
        if self.first is None:
            self.first, self.started = done, time.monotonic()
        now = time.monotonic()
        per_second = (done - self.first) / max(1e-9, now - self.started)
        tokens = per_second * self.settings.batch * self.settings.block
        text = f"loss {self.loss:.3f}  rate {rate:.1e}  {tokens:,.0f} tokens/s"
        if self.bar:
            self.bar.update(self.task, completed=done, description=text)
        elif now - self.printed >= PLAIN_SECONDS or done == self.settings.steps:
            self.printed = now
            left = (self.settings.steps - done) / per_second / 60 if per_second else 0.0
            print(
                f"step {done}/{self.settings.steps}  {text}  {left:.0f} min left",
                flush=True,
            )
