"""`espalier generate`: text from prompts, with the settings saved beside the adapter."""

from __future__ import annotations

import shlex
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
from espalier.commands.noise import aside
from espalier.commands.predict import Overwrite, check_target, write_lines
from espalier.commands.screen import say, whisper
from espalier.errors import SettingError

if TYPE_CHECKING:
    from espalier.generation import Adapted, Writing

EXAMPLE = """\
espalier generate runs/docs-lora --prompt "def read_lines(path):"
espalier generate runs/docs-lora --data prompts.jsonl --out answers.jsonl --temperature 0.7"""

SETTINGS: dict[str, Any] = {"context_settings": {"allow_extra_args": True}}

Tokens = Annotated[int | None, typer.Option(help="Longest answer, in tokens.", metavar="N")]
Temperature = Annotated[
    float | None, typer.Option(help="0 takes the most probable token each time.", metavar="X")
]
TopP = Annotated[float | None, typer.Option(help="Sample within this probability.", metavar="X")]
TopK = Annotated[int | None, typer.Option(help="Sample among so many tokens.", metavar="N")]
Beams = Annotated[int | None, typer.Option(help="Beam search with so many beams.", metavar="N")]
Penalty = Annotated[float | None, typer.Option(help="Above 1 avoids repetition.", metavar="X")]
Seed = Annotated[int, typer.Option(help="Seed for sampling.", metavar="N")]


def command(
    ctx: typer.Context,
    run: Run,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to answer or go on from; may be repeated.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="File with prompts; - reads stdin.")] = None,
    out: Annotated[
        str, typer.Option(help="File for the answers, as .csv or else JSON lines; - prints.")
    ] = "-",
    max_new_tokens: Tokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    overwrite: Overwrite = False,
    num_beams: Beams = None,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
    batch: Batch = 8,
    model: Base = None,
    precision: Precision = "auto",
    quantize: Quantize = None,
) -> None:
    """Write text. The settings saved with the adapter hold unless others are given here."""
    if ctx.args:  # as `espalier predict RUN TEXT` takes it
        again = shlex.join(["espalier", "generate", run, "--prompt", " ".join(ctx.args)])
        raise SettingError(f"A prompt is given with --prompt: {again}")
    if bool(prompt) == bool(data):
        raise SettingError("Give either --prompt or --data.")
    if out != "-":
        check_target(Path(out), overwrite)
    from espalier.tasks import Row

    rows = raw_rows(data) if data else [Row({TYPED: t}, "--prompt") for t in prompt or ()]
    at = opened(run, model, precision, quantize)
    how = settings(at, max_new_tokens, temperature, top_p, top_k, num_beams, repetition_penalty)
    with aside():
        from espalier.generation import write

        own = [row.values for row in for_task(at.task, rows, None)]
        answers = write(at, own, how, batch, seed)
    if out == "-":
        say(*answers)
        return
    pairs = zip(rows, answers, strict=True)
    lines: list[dict[str, Any]] = [shown_values(row) | {"prediction": text} for row, text in pairs]
    write_lines(Path(out), lines)
    whisper(f"{len(rows):,} answers are in {out}.")


def settings(
    at: Adapted,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    num_beams: int | None,
    repetition_penalty: float | None,
) -> Writing:
    """The settings saved with the adapter, with what was typed over them.

    Raises:
        SettingError: One is out of range, or the adapter's task writes no text.
    """
    from espalier.generation import Writing

    if not at.task.writes:
        raise SettingError(
            f"The adapter in {at.folder} was trained for {at.task.name} and writes no text; "
            f"use: espalier predict {at.folder} ..."
        )
    return Writing.saved(
        at.extras,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        num_beams=num_beams,
        repetition_penalty=repetition_penalty,
    )
