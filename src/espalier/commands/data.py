"""`espalier data check`: what training would make of some data, in seconds and without a model."""

from __future__ import annotations

from typing import Annotated

import typer

from espalier.commands import paragraphs
from espalier.commands.flags import mapping
from espalier.commands.noise import aside
from espalier.commands.screen import console

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

EXAMPLE = """\
espalier data check reviews.csv --model ./minilm --max-length 128
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
) -> None:
    """Check data: rows, columns, lengths, what is cut off, duplicates, and what the loss sees."""
    with aside():
        from espalier.data import check as examine
        from espalier.training.models import load_tokenizer

        tokenizer = load_tokenizer(model) if model else None
        report = examine(
            train,
            validation,
            test,
            tokenizer=tokenizer,
            task=task,
            columns=mapping(columns) if columns else None,
            max_length=max_length,
            limit=limit,
        )
    console().print(report)
