"""`espalier build-base`: the quickstart's small decoder, built again from Python's own source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from espalier.commands.outcome import Interrupted
from espalier.commands.screen import say

EXAMPLE = """\
espalier build-base my-base --minutes 70"""


def command(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    minutes: Annotated[float, typer.Option(help="Time to train for; chooses the steps.")] = 70,
    steps: Annotated[
        int | None, typer.Option(help="Number of steps in place of minutes, for an exact rebuild.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and order.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Build the quickstart's decoder. Stopped with Ctrl-C, the same command goes on with it."""
    from espalier.base.build import build_base

    try:
        recipe = build_base(out, minutes=minutes, seed=seed, threads=threads, steps=steps)
    except KeyboardInterrupt:
        raise Interrupted(
            f"what was trained is in {out}.partial; the same command goes on with it."
        ) from None
    say(f"{out}: {recipe['heldout_bits_per_character']} bits per character on held-out modules.")
