"""`espalier export`: an adapter in the form that other tools read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from espalier.commands import merge
from espalier.commands.adapters import Base, Run, opened
from espalier.commands.noise import aside
from espalier.commands.screen import say
from espalier.errors import SettingError

EXAMPLE = """\
espalier export runs/reviews-lora --to peft --out reviews-peft"""


def command(
    run: Run,
    to: Annotated[
        str, typer.Option(help="peft: what PEFT and vLLM read; merged: as `espalier merge`.")
    ] = "peft",
    out: Annotated[Path | None, typer.Option(help="Folder; RUN-peft if left out.")] = None,
    model: Base = None,
    onto: merge.Onto = "dequantised",
) -> None:
    """Write an adapter for other tools: PEFT's folder, or merged into an ordinary model."""
    if to not in ("peft", "merged"):
        raise SettingError(f"--to is peft or merged; got {to!r}.")
    folder = out or Path(f"{run.rstrip('/')}-{to}")
    if to == "merged":
        merge.merge_into(run, folder, model, "auto", onto)
        return
    from espalier.training.folders import refuse_filled

    refuse_filled(folder)
    at = opened(run, model)
    with aside():
        from espalier.checkpoint import save

        save(at.model, "adapter", folder, format="peft")
    base = at.card["base"]["name"]
    say(
        f"The adapter is in {folder}, in PEFT's format. In Python:",
        f"  model = {at.task.auto_model}.from_pretrained({base!r}{_labels(at.task.labels)})",
        f"  model = peft.PeftModel.from_pretrained(model, {str(folder)!r})",
    )


def _labels(labels: tuple[str, ...] | None) -> str:
    return f", num_labels={len(labels)}" if labels else ""
