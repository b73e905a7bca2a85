"""Quickstart with an encoder: docstrings of installed modules, sorted by what they are about.

Head only, LoRA and full tuning see the same rows in the same order for the same number of steps;
each has a learning rate of its own, found with the same number of tries.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.quickstart.apart import Measured, as_json, free_folder, train_apart
from espalier.quickstart.report import encoder_readme, encoder_table
from espalier.shipped import demo_model
from espalier.training.folders import write_text

if TYPE_CHECKING:
    from rich.console import Console

# Name, recipe, learning rate: of three rates tried for each method on this data, the one with the
# lowest loss on validation rows (head 2e-3, 1e-2, 5e-2; LoRA 5e-4, 2e-3, 6e-3; full 3e-5, 2e-4,
# 6e-4). So short a run wants higher rates than the methods' defaults.
METHODS = (
    ("head only", "HeadOnly()", 5e-2),
    ("LoRA", "LoRA(rank=8)", 2e-3),
    ("full tuning", "FullTuning()", 6e-4),
)
MODEL = "demo-encoder"
Rows = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Size:
    """How much the quickstart does: enough to show something within 4 minutes on 2 cores.

    Rows are most of each split; `per_class` bounds the rows read of one subject, over all splits.
    """

    rows: int = 640
    test: int = 400
    validation: int = 100
    per_class: int = 200
    epochs: float = 2
    max_length: int = 64


QUICK = Size(rows=32, test=20, validation=10, per_class=30, epochs=1, max_length=32)


@dataclass(frozen=True)
class Comparison:
    """What came of it."""

    folder: Path
    runs: list[Measured]
    sizes: dict[str, int]
    labels: int
    tfidf: float
    majority: float

    @property
    def tested(self) -> int:
        """Rows that accuracies rest on."""
        return self.sizes["test"]


def accuracy_of(run: Measured) -> float:
    """Test accuracy of a run."""
    return run.result["metrics"]["test"]["accuracy"]


def margin(share: float, count: int) -> float:
    """Half the width of a 95 % interval around a share of `count` independent rows."""
    return 1.96 * math.sqrt(max(share * (1 - share), 0) / count)


def quickstart(size: Size, out: Path | None, seed: int, screen: Console) -> Comparison:
    """Train the three methods one after another and write down what came of it.

    Raises:
        CheckpointError: The demonstration model is missing or another.
        DataError: Too little text is installed.
    """
    demo_model()
    folder = free_folder(out, "quickstart")
    screen.print("Reading docstrings of the standard library and installed packages ...")
    rows = chosen_rows(size, seed)
    files = write_rows(rows, folder / "data")
    sizes = {split: len(some) for split, some in rows.items()}
    baseline, majority = baselines(rows)
    labels = len({row["label"] for row in rows["train"]})
    screen.print(
        f"{sizes['train']} rows to train on, {sizes['test']} to test on, {labels} subjects; "
        "no module is in both.",
        soft_wrap=True,
    )
    runs = []
    for name, method, lr in METHODS:
        screen.print(f"[bold]{name}[/bold]")
        settings = settings_of(size, seed, files) | {"method": method, "lr": lr}
        runs.append(train_apart(name, settings | {"out": str(folder / _slug(name))}, screen))
    found = Comparison(folder, runs, sizes, labels, baseline, majority)
    _write_down(found)
    return found


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-")


def settings_of(size: Size, seed: int, files: dict[str, Path]) -> dict[str, Any]:
    """The settings that all runs share, as they would stand in a config file."""
    return {
        "model": MODEL,
        **{split: str(path) for split, path in files.items()},
        "task": "classification",
        "columns": {"text": "text", "label": "label"},
        "epochs": size.epochs,
        "max_length": size.max_length,
        "batch": 16,
        "seed": seed,
    }


def chosen_rows(size: Size, seed: int) -> Rows:
    """Rows of each split, as many of each subject as the size allows."""
    from espalier.data.docstrings import docstring_rows

    per_class = max(size.per_class, size.rows // 5)
    most = {"train": size.rows, "validation": size.validation, "test": size.test}
    rows = docstring_rows(per_class, seed)
    return {split: _evenly(rows[split], count) for split, count in most.items()}


def _evenly(rows: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    """At most `count` rows, none of the labels with more than its part; order as before."""
    share = max(1, count // len({row["label"] for row in rows}))
    seen: Counter[str] = Counter()
    kept = []
    for row in rows:
        seen[row["label"]] += 1
        if seen[row["label"]] <= share:
            kept.append(row)
    return kept


def write_rows(rows: Rows, folder: Path) -> dict[str, Path]:
    """Each split as a jsonl file."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, some in rows.items():
        files[split] = folder / f"{split}.jsonl"
        write_text(files[split], "".join(json.dumps(row) + "\n" for row in some))
    return files


def baselines(rows: Rows) -> tuple[float, float]:
    """Test accuracy of tf-idf with logistic regression, and of the commonest training label."""
    from espalier.data.docstrings import tfidf_baseline

    common = Counter(row["label"] for row in rows["train"]).most_common(1)[0][0]
    hits = sum(row["label"] == common for row in rows["test"])
    return tfidf_baseline(rows), hits / len(rows["test"])


def _write_down(found: Comparison) -> None:
    """figures.json, README.md and, where matplotlib is installed, quickstart.png."""
    from espalier.quickstart import picture

    folder = found.folder
    figures = as_json(
        found.runs,
        rows=found.sizes,
        labels=found.labels,
        tfidf_accuracy=found.tfidf,
        majority_accuracy=found.majority,
    )
    write_text(folder / "figures.json", figures)
    write_text(folder / "README.md", encoder_readme(found))
    picture.encoder_picture(found, folder / "quickstart.png")


def show(found: Comparison, screen: Console) -> None:
    """Print the table."""
    screen.print()
    screen.print(encoder_table(found))
