"""`espalier train`: adapt a model to data; every setting of a run or a method is a flag."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from espalier.commands.flags import fields_of, given, method_settings, with_run_flags
from espalier.commands.outcome import Interrupted
from espalier.commands.screen import say

if TYPE_CHECKING:
    from espalier.training.config import RunConfig

EXAMPLE = """\
espalier train --model demo-encoder --train reviews.csv --method lora --rank 16 --epochs 3
espalier train --config run.yaml --lr 2e-4 --out runs/second"""

SETTINGS: dict[str, Any] = {
    "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True}
}


@with_run_flags
def command(
    ctx: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="YAML file of the same keys; flags go before it."),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print every key with its default as YAML.")
    ] = False,
    **settings: Any,
) -> None:
    """Adapt a model to your data.

    A method's own settings are flags too: --method lora --rank 16 --sites "ffn".
    `espalier train --method lora --print-config` shows which there are.
    """
    if print_config:
        say(described(settings.get("method") or "LoRA()"))
        return
    run = assemble(config, given(settings), ctx.args)
    from espalier.training import train

    try:
        train(run)
    except KeyboardInterrupt:
        raise Interrupted(kept(run)) from None


def read(words: Sequence[str]) -> RunConfig | None:
    """The run that these words of a command line ask for; None where they ask for a text.

    Raises:
        SettingError: one of them is unknown or wrong.
    """
    app = typer.Typer(add_completion=False)
    app.command(**SETTINGS)(command)
    context = typer.main.get_command(app).make_context("espalier train", list(words))
    settings = dict(context.params)
    config, asks = settings.pop("config"), settings.pop("print_config")
    return None if asks else assemble(config, given(settings), context.args)


def assemble(path: Path | None, typed: dict[str, Any], words: list[str]) -> RunConfig:
    """The settings of a run: those of the file, those typed over them, those of the method.

    Raises:
        SettingError: one of them is unknown or wrong.
    """
    from espalier.training.config import RunConfig

    if path is not None:
        run = RunConfig.from_yaml(path, typed)
    else:
        if words:  # an unknown flag is said before a missing one
            typed["method"] = method_settings(words, typed.get("method", "LoRA()"))
        run = RunConfig(**typed)
    method = method_settings(words, run.method)
    run = run.replace(method=method[0] if len(method) == 1 else method)
    if run.out is None and not run.dry_run:
        # Chosen now, so that a stopped run can be named.
        from espalier.recipes import recipe
        from espalier.training.folders import choose

        run = run.replace(out=choose(run, recipe(run.method)))
    return run


def kept(run: RunConfig, command: str = "espalier train") -> str:
    """What a run that was stopped leaves, and what to type to go on."""
    from espalier.training import state

    if run.out is None or not run.out.is_dir():
        return "nothing was written."
    again = f"{command} --config {run.out / 'config.yaml'}"
    saved = state.latest(run.out)
    when = f"every {run.save_every} steps" if run.save_every else "each epoch"
    how = f"{when}, --save-every N for every N steps"
    if saved is None:
        return (
            f"nothing was kept, for no step was saved yet ({how}). "
            f"Begin anew with\n  {again} --overwrite"
        )
    return (
        f"{saved.name.replace('-', ' ')} is the last that was saved ({how}), "
        f"in {run.out}. Go on from there with\n  {again} --resume"
    )


def described(method: object) -> str:
    """Every key with its meaning and default as YAML, and what the method takes."""
    import yaml

    from espalier.recipes import recipe
    from espalier.training.config import RunConfig

    lines = ["# espalier train --config this.yaml"]
    for name, field in RunConfig.model_fields.items():
        lines.append(f"\n# {field.description}")
        if name == "method":
            parts = recipe(method).to_json()
            lines.append(yaml.safe_dump({"method": parts[0] if len(parts) == 1 else parts}).strip())
        elif field.is_required():
            lines.append(f"{name}: ...")
        else:
            value = yaml.safe_dump({name: field.get_default()}, sort_keys=False)
            lines.append(value.strip())
    kinds = [type(part) for part in recipe(method).methods]
    taken = [f"{kind.__name__}: {', '.join(fields_of(kind))}" for kind in kinds]
    return "\n".join([*lines, "", *(f"# {line}" for line in taken)])
