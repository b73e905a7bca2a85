"""`espalier dimension`: how few trained scalars reach a share of full tuning's score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from espalier.commands.flags import given, with_run_flags, without
from espalier.commands.outcome import Interrupted
from espalier.commands.screen import show
from espalier.commands.train import assemble
from espalier.errors import SettingError

EXAMPLE = """\
espalier dimension --model demo-encoder --train reviews.csv --epochs 10 --out runs/d90"""


@without("method")
@with_run_flags
def command(
    dimensions: Annotated[
        str | None,
        typer.Option(
            help="Scalars to train, smallest first, by commas; 500 and doubled up to 64,000 if "
            "left out.",
            metavar="N,...",
        ),
    ] = None,
    share: Annotated[float, typer.Option(help="Share of full tuning's score to reach.")] = 0.9,
    full_score: Annotated[
        float | None, typer.Option(help="That score, if known: full tuning is not trained then.")
    ] = None,
    full_lr: Annotated[
        float | None, typer.Option(help="Full tuning's learning rate; --lr is the subspace's.")
    ] = None,
    structure: Annotated[
        bool, typer.Option(help="A trained factor for each tensor (SAID), or none (DID).")
    ] = True,
    every: Annotated[
        bool, typer.Option("--every", help="Train all dimensions, also after one is enough.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file of a run's keys; flags go before it.")
    ] = None,
    **settings: Any,
) -> None:
    """Measure a task's intrinsic dimension, d90, for a model.

    Full tuning is trained, then the whole model along ever more random directions until 90 % of
    its validation score is reached. The same command again goes on where it was stopped.
    """
    run = assemble(config, {"out": "runs/dimension", **given(settings)}, [])
    from espalier.training.dimension import DIMENSIONS, intrinsic_dimension

    asked = _numbers(dimensions) if dimensions else DIMENSIONS
    how: dict[str, Any] = {"share": share, "full_score": full_score, "full_lr": full_lr}
    try:
        sweep = intrinsic_dimension(run, asked, **how, structure=structure, every=every)
    except KeyboardInterrupt:
        raise Interrupted("give the same command again to go on with the sweep.") from None
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False)
    table.title = str(sweep)
    for name in sweep.titles:
        table.add_column(name, justify="right")
    for row in sweep.rows:
        table.add_row(*row)
    show(table)


def _numbers(text: str) -> list[int]:
    parts = [part.strip().replace("_", "") for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise SettingError(f"--dimensions takes whole numbers, like 500,1000,2000; got {text!r}.")
    return [int(part) for part in parts]
