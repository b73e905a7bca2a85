"""`espalier incontext`: a base model with examples in its prompt, the baseline without training."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from espalier.commands.adapters import Precision
from espalier.commands.flags import mapping
from espalier.commands.noise import aside
from espalier.commands.screen import say, show
from espalier.errors import SettingError

EXAMPLE = """\
espalier incontext --model demo-decoder --train reviews.csv --test test.csv --shots 8"""


def command(
    model: Annotated[str, typer.Option(help="A model that writes: a folder or a name on the hub.")],
    train: Annotated[str, typer.Option(help="Data to take examples from.")],
    test: Annotated[
        str | None,
        typer.Option(help="Labelled queries; train's own test split, or rows held out of it."),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Which column plays which part: text=review,label=stars.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Queries at most.", min=1)] = None,
    shots: Annotated[int, typer.Option(help="Examples before each query.", min=0)] = 8,
    choose: Annotated[
        str,
        typer.Option(
            help="The same examples of each class for all, or those most like the query.",
            metavar="seed|similar",
        ),
    ] = "seed",
    seed: Annotated[int, typer.Option(help="Which examples, and which rows are held out.")] = 0,
    instruction: Annotated[str, typer.Option(help="A text at the very beginning.")] = "",
    template: Annotated[
        str | None,
        typer.Option(help="An example, as 'Text: {text}\\nLabel: {label}'.", show_default=False),
    ] = None,
    words: Annotated[
        str | None, typer.Option(help="Words for the classes in the order of labels: bad,good.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option(help="Take away what each class word has after an empty query.")
    ] = True,
    compare: Annotated[bool, typer.Option(help="Measure without examples too.")] = True,
    max_length: Annotated[
        int | None, typer.Option(help="Longest prompt in tokens; the model's limit if left out.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at once.", min=1, metavar="N")] = 8,
    precision: Precision = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a base model that is shown examples in its prompt, and what that costs.

    Nothing trains. The metrics are those of a training run on the same data, to compare with.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise SettingError(f"--precision must be auto, fp32 or bf16; got {precision!r}.")
    with aside():
        import torch

        from espalier.data import read_task
        from espalier.incontext import InContext, in_context
        from espalier.incontext.measure import as_json as in_json
        from espalier.tasks import task_class
        from espalier.training import models

        how = InContext(
            shots=shots,
            choose=choose,
            seed=seed,
            instruction=instruction,
            template=template.replace("\\n", "\n") if template else None,
            words=tuple(word.strip() for word in words.split(",")) if words else None,
            calibrate=calibrate,
            compare=compare,
            max_length=max_length,
            batch=batch,
        )
        config = models.load_config(model)
        kind = models.writing_task(config)
        if kind is None:
            raise SettingError(f"{model} writes no text; take a decoder such as demo-decoder.")
        named = mapping(columns) if columns else None
        data = read_task(train, test=test, columns=named, prefer=kind, seed=seed)
        tokenizer = models.load_tokenizer(model)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        half = models.precision_of(precision, device, config) == "bf16"
        dtype = torch.bfloat16 if half else torch.float32
        base, _ = models.load_model(model, task_class(kind)(), tokenizer, dtype)
        models.to_device(base, device)
        found = in_context(base, tokenizer, data, how, limit=limit)
    if as_json:
        say(json.dumps(in_json(found)))
        return
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False)
    table.title = f"{model} with {found.shots:.3g} examples, {found.queries:,} queries"
    table.add_column("metric", style="cyan")
    table.add_column("with examples", justify="right")
    table.add_column("without", justify="right")
    for name, value in found.metrics.items():
        table.add_row(name, f"{value:.4g}", f"{found.bare[name]:.4g}" if found.bare else "")
    cost = dataclasses.asdict(found.cost)
    bare = f"{cost['bare_tokens']:.4g}" if found.bare else ""
    table.add_row("tokens of a prompt", f"{cost['prompt_tokens']:.4g}", bare)
    for name in ("flops", "seconds"):
        times = f"{cost[name + '_ratio']:.3g} times fewer" if found.bare else ""
        table.add_row(name + (" per query" if name == "flops" else ""), f"{cost[name]:.3g}", times)
    show(table)
    for count, what in ((found.fewer, "had fewer examples"), (found.cut, "lost their beginning")):
        if count:
            say(f"{count:,} of {found.queries:,} queries {what}: the length limit left no room.")
