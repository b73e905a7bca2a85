"""One training in a process of its own: `espalier train`, its course shown, its memory measured.

Linux counts the memory that the starting process has at that moment into the peak of the one it
starts, so the caller should be the smaller of the two: it holds no model.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import yaml

from espalier.errors import TrainingError
from espalier.training.folders import write_text

if TYPE_CHECKING:
    from rich.console import Console

_SLOW_STEPS = 2  # the first steps, in which memory is laid out, are no measure of the others


@dataclass(frozen=True)
class Measured:
    """A finished run and what it took.

    Attributes:
        name: What the table calls it.
        folder: The run folder.
        peak: Largest resident memory of the whole process in bytes; None where not known.
    """

    name: str
    folder: Path
    peak: int | None

    @cached_property
    def result(self) -> dict[str, Any]:
        """The run's result.json."""
        return json.loads((self.folder / "result.json").read_text(encoding="utf-8"))

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    @property
    def settings(self) -> dict[str, Any]:
        """The run's config.yaml."""
        return yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The training steps of the history."""
        return [line for line in self.history if line["kind"] == "train"]

    @property
    def step_seconds(self) -> float:
        """Median time of a step."""
        times = [line["seconds"] for line in self.steps]
        return statistics.median(times[_SLOW_STEPS:] or times)

    @property
    def trained(self) -> int:
        """Trained parameters, the head among them."""
        return self.result["account"]["trained"] + self.result["account"]["head"]

    @property
    def share(self) -> float:
        """Trained parameters as a share of the base's."""
        return self.trained / self.result["account"]["total"]

    @property
    def kept(self) -> int:
        """Bytes to keep."""
        return self.result["account"]["bytes"]

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON data."""
        return {
            "name": self.name,
            "metrics": self.result["metrics"],
            "trained": self.trained,
            "share": self.share,
            "kept_bytes": self.kept,
            "step_seconds": self.step_seconds,
            "peak_bytes": self.peak,
            "steps": len(self.steps),
        }


def train_apart(name: str, settings: Mapping[str, Any], screen: Console) -> Measured:
    """Run `espalier train` with these settings; `settings["out"]` is the run folder.

    Raises:
        TrainingError: It ended with an error, whose message is passed on.
    """
    folder = Path(settings["out"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = folder.parent / f".{folder.name}.yaml"
    write_text(config, yaml.safe_dump(dict(settings), sort_keys=False))
    command = [sys.executable, "-m", "espalier", "train", "--config", str(config)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "100"}
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert child.stdout is not None
    try:
        said = _follow(child.stdout, name, screen)
        peak = _finish(child)
    except BaseException:
        child.terminate()
        child.wait()
        raise
    finally:
        child.stdout.close()
        config.unlink(missing_ok=True)
    if child.returncode:
        raise TrainingError(f"{name}: " + _reason(said))
    return Measured(name, folder, peak)


def _follow(stream: IO[str], name: str, screen: Console) -> list[str]:
    """Show the course of a run: one live line on a terminal, single lines elsewhere."""
    said: list[str] = []
    if not screen.is_terminal:
        for line in stream:
            said.append(line.rstrip())
            if line.startswith("step "):
                screen.print(f"  {line.rstrip()}", markup=False, style="dim", soft_wrap=True)
        return said
    with screen.status(f"{name}: loading") as status:
        for line in stream:
            said.append(line.rstrip())
            if line.startswith("step ") and "validation" not in line:
                status.update(f"{name}: {line.rstrip()}"[: screen.width - 3])
    return said


def _finish(child: subprocess.Popen[str]) -> int | None:
    """Wait for the process; its peak resident memory in bytes, where the system tells."""
    if not hasattr(os, "wait4"):
        child.wait()
        return None
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reason(said: list[str]) -> str:
    start = next((i for i, line in enumerate(said) if line.startswith("Error: ")), None)
    return "\n".join(said[start:] if start is not None else said[-12:]).removeprefix("Error: ")


def free_folder(out: Path | None, stem: str) -> Path:
    """The folder to write to: `out`, which must be free, or the first free runs/<stem>[-n].

    Raises:
        SettingError: `out` holds something.
    """
    from espalier.training.folders import first_free, refuse_filled

    if out is None:
        return first_free(stem)
    refuse_filled(out)
    return out


def as_json(runs: list[Measured], **more: Any) -> str:
    """The figures of some runs as a JSON text."""
    return json.dumps({**more, "runs": [run.to_dict() for run in runs]}, indent=1) + "\n"
