"""`espalier quickstart`: a real model adapted to real text within minutes, without any network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from espalier.commands.outcome import Interrupted
from espalier.commands.screen import console, say
from espalier.errors import SettingError

EXAMPLE = """\
espalier quickstart
espalier quickstart --task generate"""


def command(
    task: Annotated[
        str,
        typer.Option(
            help="classify: MiniLM sorts docstrings; generate: a decoder writes them.",
            metavar="classify|generate",
        ),
    ] = "classify",
    out: Annotated[
        Path | None, typer.Option(help="Folder; runs/quickstart if left out.", metavar="PATH")
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Training rows.", min=20, metavar="N")] = None,
    seed: Annotated[int, typer.Option(help="Seed of data split and training.", metavar="N")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few rows and steps: only to see that it runs.")
    ] = False,
    base: Annotated[
        Path | None, typer.Option(help="generate: a decoder in place of the shipped one.")
    ] = None,
) -> None:
    """See it work: adapt a real model to real text, offline, in under 4 minutes on 2 cores."""
    if task not in ("classify", "generate"):
        raise SettingError(f"--task is classify or generate; got {task!r}.")
    if base is not None and task != "generate":
        raise SettingError("--base is for --task generate.")
    try:
        if task == "generate":
            _generate(out, rows, seed, quick, base)
        else:
            _classify(out, rows, seed, quick)
    except KeyboardInterrupt:
        raise Interrupted("finished parts are in the quickstart's folder.") from None


def _classify(out: Path | None, rows: int | None, seed: int, quick: bool) -> None:
    from dataclasses import replace

    from espalier.quickstart.encoder import QUICK, Size, quickstart, show
    from espalier.quickstart.report import next_steps

    size = QUICK if quick else Size()
    screen = console()
    found = quickstart(replace(size, rows=rows) if rows else size, out, seed, screen)
    show(found, screen)
    _end(found.folder, next_steps(found.folder / "lora"))


def _generate(
    out: Path | None, rows: int | None, seed: int, quick: bool, base: Path | None
) -> None:
    from dataclasses import replace

    from espalier.quickstart.decoder import QUICK, Size, next_steps, quickstart, show

    size = QUICK if quick else Size()
    screen = console()
    found = quickstart(replace(size, rows=rows) if rows else size, out, seed, base, screen)
    show(found, screen)
    _end(found.folder, next_steps(found))


def _end(folder: Path, lines: list[str]) -> None:
    say("", f"Configs, metrics, adapters and a picture are in {folder}. What to type next:")
    say(*(f"  {line}" for line in lines))
