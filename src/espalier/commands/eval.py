"""`espalier eval`: an adapter's loss and metrics on labelled data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from espalier.commands.adapters import (
    Base,
    Batch,
    Precision,
    Quantize,
    Run,
    for_task,
    opened,
    split_rows,
)
from espalier.commands.flags import mapping
from espalier.commands.noise import aside
from espalier.commands.screen import say, show
from espalier.errors import SettingError

if TYPE_CHECKING:
    from espalier.generation import Adapted
    from espalier.tasks import Row, Task
    from espalier.training.evaluate import Measured

EXAMPLE = """\
espalier eval runs/reviews-lora
espalier eval runs/reviews-lora --data test.csv"""


def command(
    run: Run,
    data: Annotated[
        str | None, typer.Option(help="Labelled data; the run's own, as it read it, if left out.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Rows to measure on; if left out test, or where there is none validation.",
            metavar="train|validation|test",
        ),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Which column plays which part: text=review,label=stars.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Rows at most, the first ones.", min=1)] = None,
    batch: Batch = 32,
    model: Base = None,
    precision: Precision = "auto",
    quantize: Quantize = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a trained adapter on labelled data: loss and the metrics of its task."""
    if split not in (None, "train", "validation", "test"):
        raise SettingError(f"--split must be train, validation or test; got {split!r}.")
    if split is not None and data is not None and Path(data).expanduser().is_file():
        raise SettingError(f"--split is for data sets with splits; {data} is one file.")
    if data is None and columns is not None:
        raise SettingError("--columns is for --data: the run's own is read as the run read it.")
    names = None
    with aside():
        if data is None:
            source, split, rows = _own_rows(run, split)
        else:
            source, (split, rows, names) = data, split_rows(data, split)
    at = opened(run, model, precision, quantize)
    with aside():
        if names is not None:
            rows = for_task(at.task, rows, mapping(columns) if columns else None, names)
        rows = rows[:limit]
        found = _measure(at, rows, batch)
    if as_json:
        about = {"data": source, "split": split, "rows": len(rows), "precision": at.precision}
        say(json.dumps({**about, **found.metrics, "doubt": found.doubt}))
        return
    from rich.table import Table

    where = source if split is None else f"the {split} rows of {source}"
    table = Table(show_edge=False, pad_edge=False, title=f"{run} on {where}, {at.precision}")
    table.add_column("metric", style="cyan")
    table.add_column(f"{len(rows):,} rows", justify="right")
    for name, value in found.metrics.items():
        table.add_row(name, f"{value:.4g}")
    show(table)
    if found.doubt:
        say(found.doubt)


def _own_rows(run: str, split: str | None) -> tuple[str, str, list[Row]]:
    """Where the run's own rows are from, which of them are to be measured on, and they.

    A split that is a source, or part of one, is read in the terms of the adapter's task. Which
    rows were set aside from training only the whole of it tells, read as the run read it.
    """
    from espalier.checkpoint import read_card
    from espalier.data import own_split
    from espalier.tasks import task_from_extras
    from espalier.training.config import RunConfig
    from espalier.training.prepare import IN_MEMORY, read_data

    card = read_card(run)  # what is no run at all is said first
    path = Path(run) / "config.yaml"
    config = RunConfig.from_yaml(path) if path.is_file() else None
    none = SettingError(f"{run} names no data to measure on; give it with --data.")
    if config is None:
        raise none
    task = task_from_extras(card["extras"])
    for name in ("test", "validation") if split is None else (split,):
        source = getattr(config, name) or config.train
        if source == IN_MEMORY:
            raise none
        rows = None if name == "train" else own_split(config, task, name)
        if rows is not None:
            return source, name, rows
    if IN_MEMORY in (config.train, config.validation):
        raise none
    data, split = read_data(config.replace(test=None)), split or "validation"
    if split not in data.splits:
        have = " and ".join(data.splits)
        raise SettingError(f"{run} has no {split} rows, but {have}; give others with --data.")
    _check_same(data.task, task)
    return config.train, split, data.splits[split]


def _check_same(now: Task, then: Task) -> None:
    """Refuse training data that makes another task than it made for the run."""
    for what, *pair in (
        ("task", [now.name], [then.name]),
        ("columns", now.columns.values(), then.columns.values()),
        ("labels", now.labels or (), then.labels or ()),
    ):
        found, known = map(", ".join, pair)
        if found != known:
            raise SettingError(
                f"The training data has changed since the run. Its {what} then: {known}; now: "
                f"{found}. Give rows with --data."
            )


def _measure(at: Adapted, rows: list[Row], batch: int) -> Measured:
    from accelerate import Accelerator

    from espalier.training.evaluate import evaluate

    examples = at.task.encode(rows, at.tokenizer, at.max_length)
    return evaluate(at.model, at.task, at.tokenizer, examples, batch, Accelerator())
