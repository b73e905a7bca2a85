"""`espalier plan`: peak memory by part and the cost of a step, before anything is loaded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from espalier.commands.flags import elsewhere, method_settings
from espalier.commands.noise import aside
from espalier.commands.screen import say, show

if TYPE_CHECKING:
    from rich.table import Table

    from espalier.planning import Plan

EXAMPLE = """\
espalier plan --model demo-encoder --method lora --rank 16 --batch 32 --length 128
espalier plan --model demo-decoder --method FullTuning --length 512 --memory 200MB"""

SETTINGS: dict[str, Any] = {
    "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True}
}

_WHY = (
    "it reads no data and plans one step, whose size is given by --batch, --length and --accumulate"
)
_BAR = 24  # characters of the longest bar
_TOLD = {
    "weights": "the base's tensors",
    "adapter": "trained numbers, best copy",
    "optimiser": "moments",
    "gradients": "of what trains",
    "activations": "kept for the backward",
    "logits": "and their gradients",
    "workspace": "gone at once",
    "libraries": "panels of products, per thread",
}


def command(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Option(help="Model folder or name, config.json, run folder (its base).")
    ],
    method: Annotated[str, typer.Option(help="What trains: a method or a sum.")] = "LoRA()",
    batch: Annotated[int, typer.Option(metavar="N", help="Examples per micro-batch.")] = 16,
    length: Annotated[int, typer.Option(metavar="N", help="Tokens per example.")] = 512,
    target_length: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens per answer (seq2seq); --length.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="The task; found from the model if left out.")
    ] = None,
    accumulate: Annotated[int, typer.Option(metavar="N", help="Micro-batches per step.")] = 1,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="nf4, fp4 or int8.")] = None,
    double_quantization: Annotated[
        bool, typer.Option(help="Quantise the scales of 4-bit weights too.")
    ] = True,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations in the backward pass.")
    ] = False,
    optimizer: Annotated[str, typer.Option(help="As of `espalier train`.")] = "adamw",
    keep: Annotated[str, typer.Option(help="Adapter kept by the run: best or last.")] = "best",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; a GPU where there is one, if left out.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory to keep within, like 24GB; says what to change.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict peak memory by part and the cost of a training step from the configuration alone.

    Settings of the method are flags too, as for `espalier train`.
    """
    words = list(ctx.args)
    with aside():
        from espalier.planning import plan

        found = plan(
            model,
            method_settings(words, method, elsewhere(ctx, _WHY)),
            batch=batch,
            length=length,
            target_length=target_length,
            task=task,
            accumulate=accumulate,
            precision=precision,
            quantize=quantize,
            double_quantization=double_quantization,
            checkpointing=checkpointing,
            optimizer=optimizer,
            keep=keep,
            device=device,
            memory=memory,
        )
    if as_json:
        say(json.dumps(found.to_json(), ensure_ascii=False))
        return
    show(_parts(found))
    say(*_cost(found))
    if found.memory is not None:
        _advise(found)


def _parts(found: Plan) -> Table:
    from rich import box
    from rich.table import Table

    from espalier.training.memory import in_words

    own = found.setup
    storage = f", base in {own.storage}" if own.storage else ""
    again = ", checkpointing" if own.checkpointing else ""
    table = Table(box=box.SIMPLE, show_header=False)
    table.title = (
        f"{own.recipe}: {own.task.name}, {own.batch} × {own.length} tokens, {own.precision}"
        f"{storage}{again}, {own.device.type}"
    )
    table.add_column("", style="cyan", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", style="green", no_wrap=True)
    table.add_column("", style="dim", overflow="fold")
    most = max(found.parts.values()) or 1
    for name, size in found.parts.items():
        bar = "█" * round(_BAR * size / most) or ("▏" if size else "")
        table.add_row(name, in_words(size), bar, _TOLD[name])
    table.add_row("peak of a step", in_words(found.peak), "", "", style="bold", end_section=True)
    rows = own.eval_batch or 2 * own.batch
    table.add_row("evaluation", in_words(found.evaluation), "", f"{rows} rows, no gradients")
    return table


def _cost(found: Plan) -> list[str]:
    from espalier.training.memory import in_words

    share = found.trained / max(1, found.total)
    per = found.flops / max(1, found.moved)
    return [
        f"A step of {found.tokens:,} tokens: {found.flops / 1e12:,.3g} TFLOP, "
        f"{in_words(found.moved)} moved ({per:.0f} FLOP per byte). "
        f"Trains {found.trained:,} of {found.total:,} ({share:.2%})."
    ]


def _advise(found: Plan) -> None:
    from espalier.planning.fit import command as train_command
    from espalier.training.memory import in_words

    assert found.memory is not None
    limit = in_words(found.memory)
    if found.needed <= found.memory:
        say(f"It fits in {limit}, with {in_words(found.memory - found.needed)} to spare.")
        return
    say(f"It does not fit in {limit}: {in_words(found.needed - found.memory)} too much.")
    for way in found.ways:
        sign = "fits" if way.fits else "not enough"
        say(f"  {in_words(way.plan.needed):>8}  {sign}: {'; '.join(way.changes)}")
    last = found.ways[-1] if found.ways else None
    if last is None or not last.fits:
        say("Nothing that is known here makes it fit: take a smaller base or more memory.")
        return
    say("", train_command(last.plan.setup))
