"""Tasks: how rows become examples, and what a model's outputs are worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from espalier.errors import SettingError, nearest
from espalier.tasks.causal import Causal
from espalier.tasks.choices import Choices
from espalier.tasks.classification import Classification, Guess
from espalier.tasks.encoding import pad_id
from espalier.tasks.multilabel import Multilabel
from espalier.tasks.regression import Regression
from espalier.tasks.rows import Row
from espalier.tasks.seq2seq import Seq2Seq
from espalier.tasks.task import IGNORED, Example, Task
from espalier.tasks.tokens import Tokens

__all__ = [
    "IGNORED",
    "TASKS",
    "Causal",
    "Choices",
    "Classification",
    "Example",
    "Guess",
    "Multilabel",
    "Regression",
    "Row",
    "Seq2Seq",
    "Task",
    "Tokens",
    "pad_id",
    "task_class",
    "task_from_extras",
]

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (Classification, Multilabel, Regression, Tokens, Causal, Seq2Seq, Choices)
}


def task_class(name: str) -> type[Task]:
    """The task called `name`.

    Raises:
        SettingError: there is none; names the nearest.
    """
    if name not in TASKS:
        raise SettingError(f"unknown task {name!r}: {nearest(name, TASKS)}")
    return TASKS[name]


def task_from_extras(extras: Mapping[str, Any]) -> Task:
    """The task that `Task.extras` described; keys that belong to others are passed over.

    Raises:
        SettingError: the extras name no task, or an unknown one.
    """
    if "task" not in extras:
        raise SettingError(
            "this adapter does not say what task it was trained for (it was saved without "
            f"extras); give the task: {', '.join(TASKS)}"
        )
    kind = task_class(extras["task"])
    known = {f.name for f in dataclasses.fields(kind)}
    values = {name: value for name, value in extras.items() if name in known}
    if values.get("labels") is not None:
        values["labels"] = tuple(values["labels"])
    return kind(**values)
