"""`check`: what a person should know about data before any training, in seconds.

Rows, labels, lengths, what is cut off, duplicates within and between splits, and a preview of
what the loss sees.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from espalier.data.loading import TaskData
from espalier.errors import DataError
from espalier.tasks import Example, Row, Task
from espalier.tasks.task import Piece

if TYPE_CHECKING:
    from rich.console import RenderableType
    from transformers import PreTrainedTokenizerBase

SAMPLE = 5_000
"""Rows per split that are tokenised at most, so that the answer comes in seconds."""


@dataclass(frozen=True)
class Lengths:
    """Middle, 95th percentile and longest."""

    median: int
    p95: int
    longest: int


@dataclass(frozen=True)
class SplitReport:
    """What was found in one split; shares are between 0 and 1, None without a tokenizer."""

    rows: int
    labels: dict[str, int]
    """How often each class occurs, the most frequent first."""
    chars: Lengths
    tokens: Lengths | None
    """Before anything is cut off."""
    tokenised: int
    """Rows that the figures on tokens rest on."""
    truncated: float | None
    answers_cut: float | None
    without_target: list[str]
    """Places of rows of which nothing would be learned."""
    duplicates: int
    """Rows whose input, up to case, spaces and punctuation, occurred before in this split."""
    contradictions: int
    """Inputs that occur with more than one label."""
    in_train: int
    """Rows whose input also occurs in training."""


@dataclass(frozen=True)
class Report:
    """The result of `check`; print it with rich, or take `to_json()`."""

    task: str
    columns: dict[str, str]
    labels: list[str] | None
    max_length: int | None
    notes: list[str]
    splits: dict[str, SplitReport]
    previews: list[list[Piece]]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        found = dataclasses.asdict(self)
        found["previews"] = [
            [{"text": piece.text, "learned": piece.learned} for piece in preview]
            for preview in self.previews
        ]
        return found

    def __rich__(self) -> RenderableType:
        from espalier.data.preview import render

        return render(self)


def check(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    *,
    previews: int = 3,
) -> Report:
    """Look through read data.

    Args:
        data: what `read_task` gave; each of its rows is already known to be usable.
        tokenizer: for lengths in tokens and what is cut off; without it those are None.
        max_length: tokens per example; None: the tokenizer's limit.
        previews: training rows to show.
    """
    seen = {data_key(data.task, row) for row in data.splits.get("train", [])}
    splits = {
        name: _split_report(
            data.task, rows, tokenizer, max_length, set() if name == "train" else seen
        )
        for name, rows in data.splits.items()
    }
    notes = list(data.notes)
    first = next(iter(splits.values()))
    missing = [name for name in data.task.labels or () if name not in first.labels]
    if missing and "train" in splits:
        more = ", …" if len(missing) > 8 else ""
        notes.append(f"labels without a row in training: {', '.join(missing[:8])}{more}")
    return Report(
        data.task.name,
        dict(data.task.columns),
        None if data.task.labels is None else list(data.task.labels),
        max_length,
        notes,
        splits,
        [
            data.task.preview(row, tokenizer, max_length)
            for row in _sampled(data.splits.get("train", []), previews)
        ],
    )


def data_key(task: Task, row: Row) -> str:
    """A row's input without case, white space and punctuation, unless nothing else is in it."""
    text = task.key(row)
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def _split_report(
    task: Task,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int | None,
    seen: set[str],
) -> SplitReport:
    keys = [data_key(task, row) for row in rows]
    classes = [task.classes(row) for row in rows]
    answers: dict[str, set[tuple[str, ...]]] = {}
    for key, names in zip(keys, classes, strict=True):
        answers.setdefault(key, set()).add(tuple(names))
    sample = _sampled(rows, SAMPLE)
    examples, without = _encoded(task, sample, tokenizer, max_length)
    cut = [len(e["input_ids"]) < e["full"] for e in examples]
    return SplitReport(
        rows=len(rows),
        labels=dict(Counter(name for names in classes for name in names).most_common()),
        chars=lengths([len(task.key(row)) for row in rows]),
        tokens=lengths([e["full"] for e in examples]) if examples else None,
        tokenised=len(sample) if tokenizer is not None else 0,
        truncated=sum(cut) / len(cut) if cut else None,
        answers_cut=sum(e.get("cut", 0) for e in examples) / len(examples) if examples else None,
        without_target=without,
        duplicates=len(keys) - len(set(keys)),
        contradictions=sum(len(sets) > 1 for sets in answers.values()),
        in_train=sum(key in seen for key in keys),
    )


def lengths(values: Sequence[int]) -> Lengths:
    """Middle, 95th percentile (the value that 95 % do not exceed) and longest."""
    if not values:
        return Lengths(0, 0, 0)
    ordered = sorted(values)
    return Lengths(
        ordered[(len(ordered) - 1) // 2], ordered[(len(ordered) * 95 - 1) // 100], ordered[-1]
    )


def _sampled(rows: Sequence[Row], count: int) -> list[Row]:
    """At most `count` rows, in order, the same ones each time."""
    if len(rows) <= count:
        return list(rows)
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), count))]


def _encoded(
    task: Task,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int | None,
) -> tuple[list[Example], list[str]]:
    """Examples, and the places of rows that leave nothing to learn."""
    if tokenizer is None:
        return [], []
    try:
        return task.encode(rows, tokenizer, max_length), []
    except DataError:  # some row has no target: find out which
        examples: list[Example] = []
        without = []
        for row in rows:
            try:
                examples += task.encode([row], tokenizer, max_length)
            except DataError:
                without.append(row.where)
        return examples, without
