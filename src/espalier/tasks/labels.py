"""Class names: how they are found in training data, and how a cell becomes a class number.

The order never depends on the order of rows: names given from outside keep theirs, names found
in the data are sorted (as numbers where all are whole numbers).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from espalier.errors import DataError, nearest
from espalier.tasks.rows import Row, cell, is_missing, kind, shown

SHOWN_LABELS = 12


def label_name(value: Any, row: Row, column: str) -> str:
    """The name of the class a cell stands for: text as it is, whole numbers as their digits.

    Raises:
        DataError: the cell is empty or holds neither text nor a whole number.
    """
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{row.where}: column {column!r} has no label (found {value!r})")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    raise DataError(
        f"{row.where}: column {column!r} holds {kind(value)} {shown(value)}, "
        "need the name or the number of a class"
    )


def one_answer(guessed: Iterable[str], right: Iterable[str], of: str = "rows") -> str | None:
    """A sentence where all guesses are one class, though the right answers are not; else None."""
    given = Counter(guessed)
    if len(given) != 1 or len(set(right)) < 2:
        return None
    ((name, count),) = given.items()
    return (
        f"The model answers with one class, {name!r}, for all {count:,} {of}: the accuracy is that "
        "class's share. Try more steps, another learning rate, or rows in which the classes are "
        "more even."
    )


def found_labels(cells: Iterable[tuple[Row, Any]], column: str) -> tuple[str, ...]:
    """The class names of training cells, sorted.

    Raises:
        DataError: text and numbers are mixed, or fewer than two classes are there.
    """
    first: dict[str, Row] = {}
    names: set[str] = set()
    for row, value in cells:
        names.add(label_name(value, row, column))
        first.setdefault(kind(value), row)
    if len(first) > 1:
        (one, a), (two, b) = list(first.items())[:2]
        raise DataError(
            f"column {column!r} mixes kinds of labels: {one} at {a.where}, {two} at {b.where}; "
            "write them all the same way"
        )
    if len(names) < 2:
        raise DataError(
            f"column {column!r} has only one label in training ({', '.join(names)}): "
            "there is nothing to tell apart"
        )
    return sorted_names(names)


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Names in a fixed order: by number where all are whole numbers, else by character."""
    unique = set(names)
    if all(name.lstrip("-").isdigit() for name in unique):
        return tuple(sorted(unique, key=int))
    return tuple(sorted(unique))


def label_id(value: Any, row: Row, column: str, labels: Sequence[str], indexed: bool) -> int:
    """The class number of a cell; `indexed` lets a whole number stand for its place in `labels`.

    Raises:
        DataError: the label is none of `labels`; names the row, the label and the nearest ones.
    """
    name = label_name(value, row, column)
    if name in labels:
        return labels.index(name)
    if indexed and name.isdigit() and int(name) < len(labels):
        return int(name)
    known = ", ".join(labels[:SHOWN_LABELS]) + (", …" if len(labels) > SHOWN_LABELS else "")
    hint = nearest(name, labels) if len(labels) > SHOWN_LABELS else ""
    unlabelled = " (the value -1 often means that a split has no labels)" if name == "-1" else ""
    raise DataError(
        f"{row.where}: label {name!r} in column {column!r} is unknown{unlabelled}: "
        f"training has {len(labels)} labels: {known}"
        + (f"; {hint}" if hint.startswith("did") else "")
        + ". Correct the row, leave it out, or name every class in the labels.json of training"
    )


def class_settings(labels: Sequence[str] | None) -> dict[str, Any]:
    """Keywords for `from_pretrained` that give a model these classes."""
    names = labels or ()
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


def column_cells(rows: Iterable[Row], column: str) -> list[tuple[Row, Any]]:
    """Each row with its cell in `column`."""
    return [(row, cell(row, column)) for row in rows]
