"""One row of data and the checks on its cells; every complaint names the file and the line.

A row is born raw (the columns of the file), and a task turns it into its own canonical values
("text", "label", ...). It keeps where it came from, so that an error can point at it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from espalier.errors import DataError, nearest


@dataclass(frozen=True, slots=True)
class Row:
    """Values by column, and the place they came from, such as `train.jsonl:17`."""

    values: Mapping[str, Any]
    where: str


def is_missing(value: Any) -> bool:
    """Tell whether a cell holds nothing: None or not-a-number."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def cell(row: Row, column: str) -> Any:
    """The value of `column`; a dotted name reaches into nested objects (`translation.en`).

    Raises:
        DataError: the row has no such column; names those it has.
    """
    if column in row.values:
        return row.values[column]
    value: Any = row.values
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            found = ", ".join(map(str, row.values)) or "none"
            raise DataError(
                f"{row.where}: no column {column!r}; columns found: {found} "
                f"({nearest(column, map(str, row.values))})"
            )
        value = value[part]
    return value


def text_cell(row: Row, column: str, *, blank: bool = False) -> str:
    """The text in `column`.

    Raises:
        DataError: it is missing, blank (unless `blank` allows it), or no text.
    """
    value = cell(row, column)
    if is_missing(value):
        if blank:
            return ""
        raise DataError(f"{row.where}: column {column!r} is empty (found {value!r}, need text)")
    if not isinstance(value, str):
        raise DataError(
            f"{row.where}: column {column!r} holds {kind(value)} {shown(value)}, need text"
        )
    if not blank and not value.strip():
        raise DataError(f"{row.where}: column {column!r} is blank, need text")
    return value


def number_cell(row: Row, column: str) -> float:
    """The finite number in `column`; text such as "3.5" is read as one.

    Raises:
        DataError: it is missing, not a number, or not finite.
    """
    value = cell(row, column)
    if is_missing(value) or value == "":
        raise DataError(f"{row.where}: column {column!r} is empty (found {value!r}, need a number)")
    number = as_number(value)
    if number is None or not math.isfinite(number):
        raise DataError(
            f"{row.where}: column {column!r} holds {kind(value)} {shown(value)}, "
            "need a finite number"
        )
    return number


def as_number(value: Any) -> float | None:
    """The value as a float, also from text, or None where it is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def kind(value: Any) -> str:
    """What a person calls the type of a cell."""
    names = {bool: "true/false", int: "a number", float: "a number", str: "text"}
    names |= {list: "a list", dict: "an object", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")


def shown(value: Any, width: int = 60) -> str:
    """The value as it stands in the file, cut to `width` characters."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 1] + "…"
