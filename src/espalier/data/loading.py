"""`read_task`: from what a person points at to a task and checked rows per split."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from espalier.data.building import build_task, check_numbers
from espalier.data.columns import recognise
from espalier.data.forms import Form
from espalier.data.sources import SPLITS, Raw, Source, read_source
from espalier.errors import DataError, SettingError
from espalier.tasks import Causal, Row, Task, task_class
from espalier.tasks.rows import is_missing
from espalier.wording import setting

if TYPE_CHECKING:
    from espalier.training.config import RunConfig


@dataclass
class TaskData:
    """A task, its rows by split ("train", "validation", "test"), and what was noticed."""

    task: Task
    splits: dict[str, list[Row]]
    notes: tuple[str, ...] = field(default=())
    """Sentences for the person: what was recognised, made up, or left out."""


def read_task(
    train: Source,
    validation: Source | None = None,
    test: Source | None = None,
    *,
    task: str | None = None,
    prefer: str | None = None,
    columns: Mapping[str, str] | None = None,
    label_names: Sequence[str] | None = None,
    limit: int | None = None,
    validation_share: float = 0.1,
    seed: int = 0,
    system: str | None = None,
    chat_template: str | None = None,
    prefix: str = "",
    documents: str = "file",
) -> TaskData:
    """Read data, find out its task, and check every row.

    Args:
        train: a file, a folder with train/validation/test files, a saved or hub data set, or a
            list of dicts (or such lists by split: `{"train": ..., "test": ...}`).
        validation: the like for validation; without any, a share of training is set aside.
        test: the like for testing.
        task: "classification", "multilabel", "regression", "tokens", "causal", "seq2seq" or
            "choices"; by default what the columns say.
        prefer: the task to take where the columns allow several, "causal" or "seq2seq" by the
            base; it also says which of both ranks choices.
        columns: your columns by the names the task gives them, `{"text": "review"}`.
        label_names: class names in the order of their numbers.
        limit: rows per split to keep, chosen by their inputs and `seed`: training keeps the same
            ones whether validation is set aside from it or given, and a smaller limit some of them.
        validation_share: share of training rows set aside if there is no validation; 0: none.
        seed: decides which rows are set aside and kept.
        system: a system text for conversations that bring none.
        chat_template: a Jinja template instead of the tokenizer's.
        prefix: a text put before each source (seq2seq) or question (choices).
        documents: whether a .txt file is one text ("file") or one per paragraph ("paragraphs").

    Raises:
        DataError: something cannot be read or used; names file and line.
        SettingError: a setting is wrong.
    """
    if task is not None:
        task_class(task)
    if not 0 <= validation_share < 1:
        share = setting("validation_share", validation_share)
        raise SettingError(f"{share}: must be at least 0 and below 1")
    if limit is not None and limit < 1:
        raise SettingError(f"{setting('limit', limit)}: must be at least 1")
    raw, others = _read_splits(train, {"validation": validation, "test": test}, documents)
    if label_names is not None:
        raw.label_names, others = {"": list(label_names)}, {}
    form = recognise(raw.splits["train"], task, prefer, columns)
    made = build_task(
        form,
        raw.splits["train"],
        raw.label_names,
        system=system,
        chat_template=chat_template,
        prefix=prefix,
        writer=prefer,
    )
    for name, names in others.items():
        check_numbers(made, raw.splits[name], names)
    notes = [_said(form, made)]
    _leave_out_unlabelled(raw, form, notes, given={"validation": validation, "test": test})
    splits = {
        name: [made.read(row) for row in raw.splits[name]] for name in SPLITS if name in raw.splits
    }
    if "validation" not in splits:
        splits = _set_aside(made, splits, validation_share, seed, notes)
    if limit is not None:
        splits = {name: _limited(made, rows, limit, seed) for name, rows in splits.items()}
    return TaskData(made, splits, tuple(notes))


def _read_splits(
    train: Source, more: Mapping[str, Source | None], documents: str
) -> tuple[Raw, dict[str, dict[str, list[str]]]]:
    """Raw rows of the training source, and of further sources in place of its own splits.

    The label names of the further sources come beside, by split.
    """
    names = {}
    raw = read_source(train, documents)
    if "train" not in raw.splits:
        raise DataError(f"{train}: there is no train split; found {', '.join(raw.splits)}")
    for name, source in more.items():
        if source is not None:
            other = read_source(source, documents, name)
            raw.splits[name], names[name] = _split_of(other, name, source), other.label_names
    return raw, names


def read_rows(
    source: Source,
    task: Task,
    *,
    columns: Mapping[str, str] | None = None,
    labelled: bool = True,
    split: str = "test",
    limit: int | None = None,
) -> list[Row]:
    """Further rows for a known task, as for evaluation; or for prediction (`labelled=False`).

    The columns are the task's own; if the file does not have them, they are recognised anew.

    Raises:
        DataError: something cannot be read or used; names file and line.
    """
    raw = read_source(source, split=split)
    rows = _split_of(raw, split, source)
    own = task_with_columns(task, rows, columns, labelled)
    if labelled:
        check_numbers(own, rows, raw.label_names)
    return [own.read(row, labelled) for row in rows[:limit]]


def own_split(config: RunConfig, task: Task, split: str) -> list[Row] | None:
    """A run's validation or test rows, in the terms of the task that it trained for.

    None where the run has none but what may have been set aside from its training rows.

    Raises:
        DataError: something cannot be read or used; names file and line.
    """
    named = getattr(config, split)
    source = named or config.train
    raw = read_source(source, config.documents, split if named else "train")
    rows = _split_of(raw, split, source) if named else raw.splits.get(split, [])
    if not named and (not rows or _unlabelled(rows, task.columns.get("label"))):
        return None
    own = task_with_columns(task, rows, None, True)
    check_numbers(own, rows, raw.label_names)
    found = [own.read(row) for row in rows]
    return found if config.limit is None else _limited(own, found, config.limit, config.seed)


def task_with_columns(
    task: Task, rows: Sequence[Row], columns: Mapping[str, str] | None, labelled: bool
) -> Task:
    """The task with the columns that these rows have."""
    found = {str(c) for row in rows[:1000] for c in row.values}
    wanted = {**task.columns, **(columns or {})}
    answers = {"label", "tags", "completion", "output", "target"}
    needed = [c for name, c in wanted.items() if labelled or name not in answers]
    if columns or not labelled or all(c.split(".")[0] in found for c in needed):
        return replace(task, columns=wanted)
    form = recognise(rows, task.name)
    if set(form.columns) != set(task.columns):
        return task  # whose reading will name the missing column
    return replace(task, columns=form.columns)


def _split_of(raw: Raw, name: str, source: Source) -> list[Row]:
    if name in raw.splits:
        return raw.splits[name]
    if len(raw.splits) == 1:
        return next(iter(raw.splits.values()))
    raise DataError(f"{source}: there is no {name} split; found {', '.join(raw.splits)}")


def _said(form: Form, task: Task) -> str:
    names = "" if task.labels is None else f"; {len(task.labels)} labels"
    return f"read as {form}{names}"


def _leave_out_unlabelled(
    raw: Raw, form: Form, notes: list[str], given: Mapping[str, Source | None]
) -> None:
    """Drop splits that come without labels (-1 everywhere), as hub test sets often do."""
    for name in ("validation", "test"):
        blank = _unlabelled(raw.splits.get(name, []), form.columns.get("label"))
        if blank and given.get(name) is None:
            del raw.splits[name]
            notes.append(f"{name} has no labels and is left out")


def _unlabelled(rows: Sequence[Row], column: str | None) -> bool:
    """Whether there are rows, and none of them has its answer in the column of labels."""
    if column is None or not rows:
        return False
    return all(is_missing(v := row.values.get(column)) or v == -1 for row in rows)


def _set_aside(
    task: Task, splits: dict[str, list[Row]], share: float, seed: int, notes: list[str]
) -> dict[str, list[Row]]:
    """Move a share of training to validation; rows with the same input stay together.

    Plain text gives up its end, so that both parts stay in one piece.
    """
    rows = splits["train"]
    count = round(len(rows) * share)
    if share and not count and len(rows) > 1:
        count = 1
    if not count or count >= len(rows):
        return splits
    if isinstance(task, Causal) and task.form == "text":
        train, validation = rows[:-count], rows[-count:]
    else:
        keys = [_rank(task.key(row), seed) for row in rows]
        bound = sorted(keys)[count - 1]
        train = [row for row, key in zip(rows, keys, strict=True) if key > bound]
        validation = [row for row, key in zip(rows, keys, strict=True) if key <= bound]
    if not train:
        return splits
    notes.append(
        f"{len(validation)} of {len(rows)} training rows are set aside for validation (seed {seed})"
    )
    return {"train": train, "validation": validation} | {
        name: kept for name, kept in splits.items() if name != "train"
    }


def _rank(key: str, seed: int) -> str:
    """A place in an order that depends on nothing but the text and the seed."""
    return hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()


def _limited(task: Task, rows: list[Row], limit: int, seed: int) -> list[Row]:
    """At most `limit` rows: those last set aside for validation, whether any were or not."""
    if len(rows) <= limit:
        return rows
    if isinstance(task, Causal) and task.form == "text":
        return rows[:limit]
    keys = [_rank(task.key(row), seed) for row in rows]
    kept = sorted(range(len(rows)), key=keys.__getitem__, reverse=True)[:limit]
    return [rows[i] for i in sorted(kept)]
