"""From a recognised form to a task that knows its columns and labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from espalier.data.forms import Form
from espalier.errors import DataError, SettingError
from espalier.tasks import (
    Causal,
    Choices,
    Classification,
    Multilabel,
    Regression,
    Seq2Seq,
    Task,
    Tokens,
)
from espalier.tasks.labels import column_cells, found_labels, label_name
from espalier.tasks.multilabel import has_flags, label_list
from espalier.tasks.rows import Row, as_number
from espalier.tasks.tokens import word_list
from espalier.wording import setting


def build_task(
    form: Form,
    rows: Sequence[Row],
    names: Mapping[str, Sequence[str]],
    *,
    system: str | None = None,
    chat_template: str | None = None,
    prefix: str = "",
    writer: str | None = None,
) -> Task:
    """The task of a form; labels come from `names` by column, else from the training rows.

    `writer` is the task of a base made to write, where it is known.

    Raises:
        DataError: the labels cannot be used.
        SettingError: a setting that the form has no use for.
    """
    if (system or chat_template) and form.kind != "chat":
        raise SettingError(
            f"{setting('system')} and {setting('chat_template')} are for conversations; these "
            f"rows are read as {form}"
        )
    if prefix and form.task not in ("seq2seq", "choices"):
        raise SettingError(
            f"{setting('prefix')} is for seq2seq and choices; these rows are read as {form}"
        )
    if form.task == "causal":
        return Causal(form.columns, None, form.kind, form.separator, system, chat_template)
    if form.task == "regression":
        column = form.columns["label"]
        if _is_named(column, names) and (stated := _stated_names(column, names)):
            raise SettingError(
                f"column {column!r} holds numbers of classes, whose names the data states "
                f"({', '.join(stated[:3])}, …); {setting('task', 'regression')} would learn their "
                "order. Leave it out, or take the names away"
            )
        return Regression(form.columns)
    if form.task == "seq2seq":
        return Seq2Seq(form.columns, None, prefix)
    if form.task == "choices":
        return Choices(form.columns, None, writer or "causal", prefix)
    column = form.columns["tags" if form.task == "tokens" else "label"]
    if form.task == "classification":
        cells = column_cells(rows, column)
        return Classification(form.columns, *_class_names(column, cells, names))
    read = word_list if form.task == "tokens" else label_list
    lists = [(row, read(row, column)) for row in rows]
    flags = form.task == "multilabel" and has_flags(values for _, values in lists)
    if flags:
        return Multilabel(form.columns, _flag_names(column, len(lists[0][1]), names), False, True)
    cells = [(row, value) for row, values in lists for value in values]
    labels, indexed = _class_names(column, cells, names)
    if form.task == "tokens":
        return Tokens(form.columns, labels, indexed)
    return Multilabel(form.columns, labels, indexed)


def check_numbers(task: Task, rows: Iterable[Row], names: Mapping[str, Sequence[str]]) -> None:
    """Refuse a class's number that is another class by the `names` of the rows' own source.

    Names that differ in capitals or outer spaces are one class's.

    Raises:
        DataError: there is one; says what it means here and what in training.
    """
    flags = isinstance(task, Multilabel) and task.flags
    if not (flags or (isinstance(task, Classification | Multilabel | Tokens) and task.indexed)):
        return
    column, trained = task.columns["tags" if task.name == "tokens" else "label"], task.labels or ()
    own = _stated_names(column, names) if _is_named(column, names) else None
    pairs = list(zip(own or (), trained, strict=False))
    other = {at for at, (a, b) in enumerate(pairs) if a.strip().casefold() != b.strip().casefold()}
    for row in rows if own is not None and other else ():
        value = row.values.get(column)
        values = value if isinstance(value, list | tuple) else [value]
        values = [at for at, flag in enumerate(values) if flag] if flags else values
        for number in map(as_number, values):
            at = int(number) if number is not None and number.is_integer() else -1
            if own is not None and at in other:
                raise DataError(
                    f"{row.where}: label {at} is {own[at]!r} by the label names of this data, and "
                    f"{trained[at]!r} by those of training. Give names in place of numbers, or the "
                    "labels.json of training"
                )


def _is_named(column: str, names: Mapping[str, Sequence[str]]) -> bool:
    """Whether label names are those of this column; a list without a name may be another's."""
    return column in names or column in ("label", "labels", "tags", "ner_tags")


def _flag_names(column: str, count: int, names: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Names for the places of 0/1 flags: those stated if their number is right, else numbers."""
    stated = _stated_names(column, names)
    if stated is None:
        return tuple(str(i) for i in range(count))
    if len(stated) != count:
        raise DataError(
            f"column {column!r} has {count} flags per row, but {len(stated)} label names are given"
        )
    return _distinct(stated)


def _class_names(
    column: str, cells: Sequence[tuple[Row, Any]], names: Mapping[str, Sequence[str]]
) -> tuple[tuple[str, ...], bool]:
    """Class names, and whether whole numbers in the data are places among them."""
    stated = _stated_names(column, names)
    if stated is not None:
        listed = _distinct(stated)
        if _is_named(column, names):
            return listed, True
        used = {label_name(value, row, column) for row, value in cells}
        if all(n in listed or (n.isdigit() and int(n) < len(listed)) for n in used):
            return listed, True
    return found_labels(cells, column), False


def _stated_names(column: str, names: Mapping[str, Sequence[str]]) -> Sequence[str] | None:
    for key in (column, f"{column}s", column.removeprefix("ner_"), ""):
        if key in names:
            return names[key]
    return None


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    doubled = sorted({n for n in names if list(names).count(n) > 1})
    if doubled:
        raise DataError(f"label names must differ; doubled: {', '.join(doubled)}")
    return tuple(names)
