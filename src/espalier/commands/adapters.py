"""What the commands that use a trained adapter share: its options, opening it, reading rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from espalier.commands.noise import aside
from espalier.errors import DataError, SettingError

if TYPE_CHECKING:
    from espalier.generation import Adapted
    from espalier.tasks import Row, Task

Run = Annotated[str, typer.Argument(help="Run folder or adapter folder.", metavar="RUN")]
Base = Annotated[
    str | None,
    typer.Option("--model", help="Where the base model is, if not where the adapter says."),
]
Batch = Annotated[int, typer.Option(help="Rows at once.", min=1, metavar="N")]
Precision = Annotated[
    str,
    typer.Option(
        help="fp32, bf16 or auto: as in training, where this device is made for it.",
        metavar="auto|fp32|bf16",
    ),
]

Quantize = Annotated[
    str | None,
    typer.Option(
        help="How the base's layers are stored; as in training if left out.",
        metavar="nf4|fp4|int8|none",
    ),
]


def opened(
    run: str, model: str | None, precision: str = "auto", quantize: str | None = None
) -> Adapted:
    """The adapter on its base; what libraries say about it stays off the screen."""
    if quantize not in (None, "nf4", "fp4", "int8", "none"):
        raise SettingError(f"--quantize must be nf4, fp4, int8 or none; got {quantize!r}.")
    if precision not in ("auto", "fp32", "bf16"):
        raise SettingError(f"--precision must be auto, fp32 or bf16; got {precision!r}.")
    with aside():
        from espalier.generation import open_adapter

        return open_adapter(run, model, precision, quantize)  # type: ignore[arg-type]


def raw_rows(source: str) -> list[Row]:
    """The rows of a file, a data set (its test split, if it has several), or `-` for stdin.

    Raises:
        DataError: It cannot be read; names file and line.
    """
    if source == "-":
        return _from_stdin()
    with aside():
        return split_rows(source)[1]


def split_rows(
    source: str, asked: str | None = None
) -> tuple[str | None, list[Row], dict[str, list[str]]]:
    """A split of a data set, its rows, and label names that the source states, by column.

    The split is the one asked for, else test, else the only one; a file is none: None.

    Raises:
        DataError: It cannot be read, or has no such split.
    """
    from espalier.data.sources import read_source

    raw = read_source(source, split=asked or "test")
    splits = raw.splits
    if Path(source).expanduser().is_file():
        return None, next(iter(splits.values())), raw.label_names
    name = asked or (next(iter(splits)) if len(splits) == 1 else "test")
    if name not in splits:
        raise DataError(
            f"{source} holds {', '.join(splits)} and no {name} split; give one file of it."
        )
    return name, splits[name], raw.label_names


def _from_stdin() -> list[Row]:
    from espalier.tasks import Row

    rows = []
    for number, line in enumerate(sys.stdin, 1):
        if not line.strip():
            continue
        where = f"stdin:{number}"
        if not line.lstrip().startswith("{"):
            rows.append(Row({TYPED: line.rstrip("\n")}, where))
            continue
        try:
            rows.append(Row(json.loads(line), where))
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: broken JSON: {error.msg}.") from None
    if not rows:
        raise DataError("stdin is empty: nothing to read.")
    return rows


TYPED = "\0text"  # stands for the task's column in rows that are a plain text


def for_task(
    task: Task,
    rows: Sequence[Row],
    columns: Mapping[str, str] | None,
    names: Mapping[str, Sequence[str]] | None = None,
) -> list[Row]:
    """Rows in the task's own terms; plain texts get the task's column.

    With `names`, the label names of their source by column, the rows bring their answers.

    Raises:
        DataError: A row cannot be used; names file and line.
    """
    from espalier.data.building import check_numbers
    from espalier.data.loading import task_with_columns

    labelled = names is not None
    own = task_with_columns(task, rows, columns, labelled)
    if names is not None:
        check_numbers(own, rows, names)
    return [own.read(typed_row(own, row), labelled) for row in rows]


def typed_row(task: Task, row: Row) -> Row:
    """A row whose plain text, if it is one, stands in the column that the task reads."""
    from espalier.tasks import Row

    if TYPED not in row.values:
        return row
    text = row.values[TYPED]
    needed = [name for name in task.columns if name not in _ANSWERS]
    if "messages" in task.columns:
        return Row({task.columns["messages"]: [{"role": "user", "content": text}]}, row.where)
    if "tokens" in task.columns:
        return Row({task.columns["tokens"]: text.split()}, row.where)
    if needed[1:] and "input" not in needed:
        names = ", ".join(task.columns[name] for name in needed)
        raise DataError(f"{row.where}: this adapter needs {names}; give rows with --data.")
    return Row({task.columns[needed[0]]: text}, row.where)


_ANSWERS = {"label", "labels", "tags", "completion", "output", "target", "system"}


def shown_values(row: Row) -> dict[str, Any]:
    """A row as it is written back: a plain text under the name `text`."""
    return {"text" if name == TYPED else name: value for name, value in row.values.items()}
