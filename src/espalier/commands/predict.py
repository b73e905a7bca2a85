"""`espalier predict`: rows in, the same rows with a prediction out."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from espalier.commands.adapters import (
    TYPED,
    Base,
    Batch,
    Precision,
    Quantize,
    Run,
    for_task,
    opened,
    raw_rows,
    shown_values,
)
from espalier.commands.flags import mapping
from espalier.commands.noise import aside
from espalier.commands.screen import say, whisper
from espalier.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Iterable

EXAMPLE = """\
espalier predict runs/reviews-lora "A film to remember."
espalier predict runs/reviews-lora --data new.csv --out predictions.jsonl
cat new.jsonl | espalier predict runs/reviews-lora --data - > predictions.jsonl"""
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace --out if it is there.")]


def command(
    run: Run,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to predict.")] = None,
    data: Annotated[
        str | None, typer.Option(help="File with rows; - reads JSON lines or texts from stdin.")
    ] = None,
    out: Annotated[
        str,
        typer.Option(
            help="File for rows with predictions, as .csv or else JSON lines; - prints them."
        ),
    ] = "-",
    overwrite: Overwrite = False,
    columns: Annotated[
        str | None, typer.Option(help="Which column plays which part: text=review.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Rows at most, the first ones.", min=1)] = None,
    batch: Batch = 32,
    model: Base = None,
    precision: Precision = "auto",
    quantize: Quantize = None,
) -> None:
    """Predict rows: what comes in comes out again, with `prediction` and `probability`."""
    if bool(texts) == bool(data):
        raise SettingError("Give either texts or --data; --data - reads stdin.")
    if file := next(filter(os.path.isfile, texts or ()), None):
        raise SettingError(f"{file} is a file; its rows are predicted with --data {file}")
    if out != "-":
        check_target(Path(out), overwrite)
    from espalier.tasks import Row

    rows = raw_rows(data) if data else [Row({TYPED: t}, "argument") for t in texts or ()]
    rows = rows[:limit]
    at = opened(run, model, precision, quantize)
    with aside():
        from espalier.generation import predict

        own = for_task(at.task, rows, mapping(columns) if columns else None)
        found = list(predict(at, own, batch))
    lines = (shown_values(row) | answer for row, answer in zip(rows, found, strict=True))
    if out == "-":
        say(*map(as_line, lines))
    else:
        write_lines(Path(out), lines)
        whisper(f"{len(rows):,} rows with predictions are in {out}.")


def as_line(row: Any) -> str:
    """A row, or a cell of one, as one JSON line; dates and the like as text."""
    return json.dumps(row, ensure_ascii=False, default=str)


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse a file that is there or cannot be written, before any work is done."""
    from espalier.training.folders import write_text

    if path.is_dir():
        raise SettingError(f"--out {path} is a folder; name a file.")
    if path.exists() and not overwrite:
        raise SettingError(
            f"--out {path} is there already; name another file, or replace it with --overwrite."
        )
    probe = path.with_name(f".{path.name}.probe")
    write_text(probe, "")
    probe.unlink()


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines, or as a table into a .csv; the file appears whole or not at all."""
    from espalier.training.folders import write_text

    if path.suffix.lower() != ".csv":
        write_text(path, "".join(as_line(row) + "\n" for row in rows))
        return
    table, text = list(rows), io.StringIO()
    columns = dict.fromkeys(name for row in table for name in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    for row in table:
        nested = {
            name: as_line(cell) for name, cell in row.items() if isinstance(cell, dict | list)
        }
        writer.writerow(row | nested)
    write_text(path, text.getvalue())
