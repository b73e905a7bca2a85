"""From a recognised form to a task that knows its columns and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from espalier.data.columns import Form
from espalier.errors import DataError, SettingError
from espalier.tasks import Causal, Classification, Regression, Task
from espalier.tasks.labels import column_cells, found_labels, label_name
from espalier.tasks.rows import Row


def build_task(
    form: Form,
    rows: Sequence[Row],
    names: Mapping[str, Sequence[str]],
    *,
    system: str | None = None,
    chat_template: str | None = None,
    prefix: str = "",
) -> Task:
    """The task of a form; labels come from `names` by column, else from the training rows.

    Raises:
        DataError: the labels cannot be used.
        SettingError: a setting that the form has no use for.
    """
    if (system or chat_template) and form.kind != "chat":
        raise SettingError(
            f"system and chat_template are for conversations; these rows are read as {form}"
        )
    if prefix and form.task != "seq2seq":
        raise SettingError(f"prefix is for seq2seq; these rows are read as {form}")
    if form.task == "causal":
        return Causal(form.columns, None, form.kind, form.separator, system, chat_template)
    if form.task == "regression":
        return Regression(form.columns)
    labels, indexed = _class_names(form.columns["label"], rows, names)
    return Classification(form.columns, labels, indexed)


def _class_names(
    column: str, rows: Sequence[Row], names: Mapping[str, Sequence[str]]
) -> tuple[tuple[str, ...], bool]:
    """Class names, and whether whole numbers in the data are places among them."""
    cells = column_cells(rows, column)
    stated = _stated_names(column, names)
    if stated is not None:
        listed = _distinct(stated)
        if column in names or column in ("label", "labels"):
            return listed, True
        # An unnamed list of labels may belong to another column than the one asked for.
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
