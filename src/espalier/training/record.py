"""What a run measured, a JSON line at a time: metrics.jsonl, and tensorboard's events beside it.

    {"kind": "train", "step": 7, "epoch": 0.4, "loss": ..., "lr": ..., "grad_norm": ..., ...}
    {"kind": "validation", "step": 10, "epoch": 0.5, "loss": ..., "accuracy": ..., "seconds": ...}
    {"kind": "places", "step": 10, "epoch": 0.5, "rank": [["encoder", 0, "attention.q", 8], ...]}

The last is what a method that lives while it trains has to tell of each place.

Everything but TIME_FIELDS is the same in a run that was killed and resumed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from espalier.errors import CheckpointError, SettingError
from espalier.wording import setting

TIME_FIELDS = ("seconds", "tokens_per_second", "examples_per_second", "memory")


class Record:
    """The lines of a run, in memory and, with a folder, in its metrics.jsonl."""

    def __init__(self, folder: Path | None, tensorboard: bool = False) -> None:
        self.lines: list[dict[str, Any]] = []
        self._path = folder / "metrics.jsonl" if folder else None
        self._writer = _writer(folder / "tensorboard") if folder and tensorboard else None
        if self._path and not self._path.exists():
            self._path.touch()

    def rewind(self, offset: int) -> None:
        """Cut the file back to what it held when a state was written, and read it.

        Nothing is done without a file: in processes other than the main one.

        Raises:
            CheckpointError: the file is shorter than it was then.
        """
        if self._path is None:
            return
        if self._path.stat().st_size < offset:
            raise CheckpointError(
                f"{self._path} has fewer than the {offset} bytes it had when the state was saved; "
                f"the run cannot be resumed: start anew with {setting('overwrite', True)}."
            )
        os.truncate(self._path, offset)
        text = self._path.read_text(encoding="utf-8")
        self.lines = [json.loads(line) for line in text.splitlines()]

    @property
    def offset(self) -> int:
        """Bytes in metrics.jsonl."""
        return self._path.stat().st_size if self._path else 0

    def add(self, kind: str, **values: Any) -> dict[str, Any]:
        """Add a line; what is written can be read at once by others."""
        line = {"kind": kind, **values}
        self.lines.append(line)
        if self._path:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if self._writer:
            for name, value in values.items():
                if isinstance(value, int | float) and name != "step":
                    self._writer.add_scalar(f"{kind}/{name}", value, values.get("step", 0))
        return line

    def close(self) -> None:
        """Finish tensorboard's file."""
        if self._writer:
            self._writer.close()


def check_tensorboard() -> None:
    """Raise SettingError with the remedy when tensorboard is not installed."""
    import importlib.util

    if importlib.util.find_spec("tensorboard") is None:
        raise SettingError(
            f"{setting('tensorboard', True)} needs the package tensorboard: "
            "pip install 'espalier[report]'."
        )


def _writer(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))
