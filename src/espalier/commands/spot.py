"""`espalier spot`: prompts of tasks for other tasks: train them, compare them, start from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from espalier.commands import paragraphs
from espalier.commands.flags import given, with_run_flags, without
from espalier.commands.noise import aside
from espalier.commands.screen import console, say
from espalier.commands.train import assemble
from espalier.errors import SettingError

EXAMPLE = """\
espalier spot sources mnli.csv sst2.csv --model demo-encoder --steps 500 --out spot
espalier train --model demo-encoder --train mine.csv --method prompttuning --steps 500 --out own
espalier spot rank own spot/mnli spot/sst2
espalier spot transfer spot/mnli --model demo-encoder --train mine.csv"""

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", epilog=paragraphs(EXAMPLE))

Metric = Annotated[
    str,
    typer.Option(
        help="How alike two prompts are: by their mean rows, or by all pairs of words.",
        metavar="mean|words",
    ),
]
Config = Annotated[
    Path | None, typer.Option("--config", help="YAML file of a run's keys; flags go before it.")
]


@app.callback()
def group() -> None:
    """Soft prompt transfer (SPoT): train prompts on tasks, rank them, start another from them."""


@app.command("sources", epilog=paragraphs(EXAMPLE.splitlines()[0]))
@without("train")
@with_run_flags
def sources(
    data: Annotated[list[str], typer.Argument(help="Training data of each task, as for --train.")],
    config: Config = None,
    **settings: Any,
) -> None:
    """Train a prompt for each task, all in one way, into folders named after their data.

    Every flag of `espalier train` but --train holds for all of them. The last step's prompt is
    kept, not the best one's, so that those of all tasks are alike: --keep best changes that.
    """
    typed = given(settings)
    folder = Path(typed.pop("out", "runs/spot"))
    typed = {"method": "PromptTuning(length=100)", "keep": "last", **typed}
    names = [Path(one).stem or one for one in data]
    if len(set(names)) < len(names):
        raise SettingError(f"two tasks would share a folder: {', '.join(sorted(names))}.")
    runs = [
        assemble(config, {**typed, "train": one, "out": folder / name}, [])
        for one, name in zip(data, names, strict=True)
    ]
    from espalier.training import train

    for run in runs:
        say(f"\n{run.train} → {run.out}")
        train(run)


@app.command("rank", epilog=paragraphs(EXAMPLE.splitlines()[2]))
def rank(
    target: Annotated[str, typer.Argument(help="A prompt trained on the target task for a while.")],
    candidates: Annotated[list[str], typer.Argument(help="Prompts of other tasks.")],
    metric: Metric = "mean",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Rank prompts by how alike they are to the target's, the most promising first."""
    with aside():
        from espalier.plain.transfer import rank_prompts

        found = rank_prompts(target, candidates, metric)
    if as_json:
        say(json.dumps(dict(found)))
        return
    from rich.table import Table

    whole = sum(max(similarity, 0) for _, similarity in found)
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("prompt", style="cyan", overflow="fold")
    table.add_column("similarity", justify="right")
    table.add_column("share in a mixture", justify="right")
    for name, similarity in found:
        share = f"{max(similarity, 0) / whole:.1%}" if whole else "-"
        table.add_row(name, f"{similarity:.4f}", share)
    console().print(table)


@app.command("transfer", epilog=paragraphs(EXAMPLE.splitlines()[3]))
@without("method")
@with_run_flags
def transfer(
    source: Annotated[list[str], typer.Argument(help="Prompts to start from: one, or several.")],
    target: Annotated[
        str | None, typer.Option(help="The target task's own prompt, to weigh several by.")
    ] = None,
    metric: Metric = "mean",
    top: Annotated[int, typer.Option(help="Mix this many of the most alike; 0 for all.")] = 0,
    config: Config = None,
    **settings: Any,
) -> None:
    """Train a prompt that starts from others; every flag of `espalier train` holds but --method."""
    typed = given(settings)
    folders = source[0] if len(source) == 1 else source
    typed["method"] = {
        "method": "SPoT",
        **{"source": folders, "target": target or "", "metric": metric, "top": top},
    }
    run = assemble(config, typed, [])
    from espalier.training import train

    train(run)
