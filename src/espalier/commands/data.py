"""`espalier data check`: what training would make of some data, in seconds and without a model."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from espalier.commands import paragraphs
from espalier.commands.flags import mapping
from espalier.commands.noise import aside
from espalier.commands.screen import console, say

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

EXAMPLE = """\
espalier data check reviews.csv --model demo-encoder --max-length 128
espalier data check train.jsonl test.jsonl"""


@app.callback()
def group() -> None:
    """Look at data before training."""


@app.command("check", epilog=paragraphs(EXAMPLE))
def check(
    train: Annotated[str, typer.Argument(help="Training data: file, folder or data set name.")],
    test: Annotated[str | None, typer.Argument(help="Test data.")] = None,
    validation: Annotated[str | None, typer.Option(help="Validation data.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Count tokens with this model's tokenizer.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="The task; found from the columns.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="Which column plays which part: text=review,label=stars.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens kept of a row; the model's limit if left out.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Rows of each split at most.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check data: rows, columns, lengths, what is cut off, duplicates, and what the loss sees."""
    with aside():
        from espalier.data import check as examine
        from espalier.data import read_task
        from espalier.training.models import load_config, load_tokenizer, writing_task

        data = read_task(
            train,
            validation,
            test,
            task=task,
            prefer=writing_task(load_config(model)) if model else None,
            columns=mapping(columns) if columns else None,
            limit=limit,
            validation_share=0,
        )
        tokenizer = load_tokenizer(model) if model else None
        report = examine(data, tokenizer, max_length)
    if as_json:
        say(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        console().print(report)
