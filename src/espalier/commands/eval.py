"""`espalier eval`: an adapter's loss and metrics on labelled data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from espalier.commands.adapters import Base, Batch, Precision, Quantize, Run, opened
from espalier.commands.flags import mapping
from espalier.commands.noise import aside
from espalier.commands.screen import console, say
from espalier.errors import SettingError

if TYPE_CHECKING:
    from espalier.generation import Adapted
    from espalier.tasks import Row

EXAMPLE = """\
espalier eval runs/reviews-lora --data test.csv"""


def command(
    run: Run,
    data: Annotated[
        str | None,
        typer.Option(help="Labelled data; the run's test or validation data if left out."),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Which column plays which part: text=review,label=stars.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Rows at most.", min=1)] = None,
    batch: Batch = 32,
    model: Base = None,
    precision: Precision = "auto",
    quantize: Quantize = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a trained adapter on labelled data: loss and the metrics of its task."""
    source, split = (data, "test") if data else _own_data(run)
    at = opened(run, model, precision, quantize)
    with aside():
        rows = _rows(at, source, split, mapping(columns) if columns else None)[:limit]
        metrics = _measure(at, rows, batch)
    if as_json:
        say(json.dumps({"data": source, "rows": len(rows), **metrics}))
        return
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False, title_justify="left", title_style="bold")
    table.title = f"{run} on {source or 'rows held out of ' + str(_config(run)['train'])}"
    table.add_column("metric", style="cyan")
    table.add_column(f"{len(rows):,} rows", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4g}")
    console().print(table)


def _config(run: str) -> dict[str, object]:
    """The settings of a run folder; none for a bare adapter folder."""
    import yaml

    path = Path(run) / "config.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _own_data(run: str) -> tuple[str | None, str]:
    """The data that the run itself was measured on; None for rows held out of training data."""
    config = _config(run)
    for split in ("test", "validation"):
        if config.get(split):
            return str(config[split]), split
    if not config.get("train") or not config.get("validation_share"):
        raise SettingError(f"{run} names no data to measure on; give it with --data.")
    return None, "validation"


def _rows(at: Adapted, source: str | None, split: str, columns: dict[str, str] | None) -> list[Row]:
    from espalier.data import read_rows

    if source is not None:
        return read_rows(source, at.task, columns=columns, split=split)
    from espalier.training.config import RunConfig
    from espalier.training.prepare import read_data

    splits = read_data(RunConfig.from_yaml(Path(at.folder) / "config.yaml")).splits
    if split not in splits:
        raise SettingError(f"{at.folder} held no rows out of training; give data with --data.")
    return splits[split]


def _measure(at: Adapted, rows: list[Row], batch: int) -> dict[str, float]:
    from accelerate import Accelerator

    from espalier.training.evaluate import evaluate

    examples = at.task.encode(rows, at.tokenizer, at.max_length)
    return evaluate(at.model, at.task, at.tokenizer, examples, batch, Accelerator())
