"""Library chatter goes to the run's log, not to the screen.

Inside `quiet`, what transformers, datasets, accelerate and others log, warn or print lands in a
file (or nowhere, when there is no run folder); the run's own lines go to the streams that were
there before, through `screen()`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

_LIBRARIES = (
    "transformers", "datasets", "accelerate", "bitsandbytes", "huggingface_hub", "torch",
    "torchao", "peft", "matplotlib", "py.warnings",
)  # fmt: skip
_screens: list[TextIO] = []


def screen() -> TextIO:
    """The stream a person reads, also while library output is turned away."""
    return _screens[-1] if _screens else sys.stdout


class _Lines(io.TextIOBase):
    """A text stream that writes whole lines with the time before each, into a log.

    Libraries may keep it as their stderr; once the log is closed it hands on to the real one.
    """

    def __init__(self, log: TextIO) -> None:
        super().__init__()
        self._log: TextIO | None = log
        self._rest = ""

    def write(self, text: str) -> int:
        if self._log is None:
            return sys.__stderr__.write(text) if sys.__stderr__ else len(text)
        *lines, self._rest = (self._rest + text).replace("\r", "\n").split("\n")
        for line in lines:
            if line.strip():
                self._log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line.rstrip()}\n")
        return len(text)

    def flush(self) -> None:
        if self._log is not None:
            self._log.flush()

    def end(self) -> None:
        """Write what is left and close the log."""
        self.write("\n")
        if self._log is not None:
            self._log.close()
        self._log = None


class _Nowhere:
    """A log that keeps nothing."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None: ...

    def close(self) -> None: ...


@contextlib.contextmanager
def quiet(path: Path | None) -> Iterator[None]:
    """Turn library output away into the file at `path` (appended), or drop it when None."""
    log: Any = open(path, "a", encoding="utf-8", buffering=1) if path else _Nowhere()  # noqa: SIM115
    lines: Any = _Lines(log)
    handler = logging.StreamHandler(lines)
    handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
    _screens.append(screen())
    try:
        with (
            contextlib.redirect_stdout(lines),
            contextlib.redirect_stderr(lines),
            _loggers(handler),
            _warnings(lines),
        ):
            yield
    finally:
        _screens.pop()
        lines.end()


@contextlib.contextmanager
def _loggers(handler: logging.Handler) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate


@contextlib.contextmanager
def _warnings(lines: Any) -> Iterator[None]:
    """Show warnings in the log; filters stay as they are, so that "error" still raises."""
    before = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        lines.write(f"{category.__name__} in {filename}:{lineno}: {message}\n")

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
