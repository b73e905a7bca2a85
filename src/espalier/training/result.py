"""What a finished run hands back, and its file in the run folder."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.container import write_text
from espalier.errors import CheckpointError


@dataclass(frozen=True)
class RunResult:
    """What came of a run.

    Attributes:
        folder: The run folder, or None when nothing was written.
        metrics: Metrics by split, like {"validation": {"loss": 0.2, "accuracy": 0.93}}; those of
            the adapter that was kept.
        best: Step and metrics of the best evaluation; empty without validation data.
        metric: What it was best in, like "accuracy"; the loss decided among equals.
        doubt: What makes the metrics of test, else validation rows doubtful, like one class for
            all of them; None where nothing does.
        history: The lines of metrics.jsonl.
        seconds: Wall-clock time of the run, or of its last part when it was resumed.
        account: Trained parameters and bytes, as `esp.account` counts them.
        steps: Optimiser steps done.
    """

    folder: Path | None
    metrics: dict[str, dict[str, float]]
    best: dict[str, float]
    metric: str
    doubt: str | None
    history: list[dict[str, Any]]
    seconds: float
    account: dict[str, Any]
    steps: int

    def write(self, folder: Path) -> None:
        """Keep everything but the history in result.json."""
        kept = dataclasses.asdict(self) | {"folder": str(folder)}
        del kept["history"]
        write_text(folder / "result.json", json.dumps(kept, indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> RunResult:
        """The result of a finished run.

        Raises:
            CheckpointError: result.json has other fields.
        """
        kept = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        kept |= {"folder": folder, "history": [json.loads(line) for line in lines]}
        if kept.keys() != {field.name for field in dataclasses.fields(RunResult)}:
            raise CheckpointError(
                f"{folder / 'result.json'} was written by another version of Espalier: its adapter "
                "can be used, and the run made anew in another folder."
            )
        return RunResult(**kept)
