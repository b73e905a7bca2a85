"""`espalier inspect`: the places of a model, what a method would train there, or an adapter's card.

A model is built from its configuration without weights, so that the answer comes at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from espalier.commands.flags import elsewhere, method_settings
from espalier.commands.noise import aside
from espalier.commands.screen import console, say, show
from espalier.errors import CheckpointError, EspalierError

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from espalier.recipes import Recipe

EXAMPLE = """\
espalier inspect demo-encoder
espalier inspect demo-encoder --method lora --rank 16 --sites "attention.q, attention.v"
espalier inspect runs/reviews-lora"""

SETTINGS: dict[str, Any] = {
    "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True}
}

_SHOWN = 24  # matched sites listed before "and N more"


def command(
    ctx: typer.Context,
    what: Annotated[str, typer.Argument(help="Model folder or name, run folder or adapter.")],
    method: Annotated[
        str | None, typer.Option(help="What it would train: a method or a sum of methods.")
    ] = None,
    sites: Annotated[
        str | None, typer.Option(help="The places that a selector picks, or the method's sites.")
    ] = None,
) -> None:
    """Show the places of a model, what a method would train there, or an adapter's card."""
    from espalier.checkpoint import WEIGHTS

    words = list(ctx.args)
    folder = Path(what)
    if any((folder / inner / WEIGHTS).is_file() for inner in ("", "adapter")):
        show(_card(folder))
        return
    if sites is not None and (method is not None or words):
        words += ["--sites", sites]
    with aside():
        import espalier as esp

        # Settings that are wrong are said before the model is looked at.
        at = elsewhere(ctx, "it looks at a model, reads no data and trains nothing")
        asked = method_settings(words, method or "lora", at) if method or words else None
        recipe = None if asked is None else esp.recipe(asked)
        model = skeleton(what)
        places = esp.sites(model)
        chosen = places.select(sites) if sites is not None else None
        plan = _plan(model, recipe) if recipe is not None else None
    if chosen is not None:
        show(_matched(chosen, sites or ""))
    elif plan is None:
        console().print(places)
    if plan is not None:
        show(plan)
    if chosen is None and plan is None:
        say(f'Try a selector:  espalier inspect {what} --sites "attention.q, attention.v"')


def skeleton(name: str) -> nn.Module:
    """A model by its configuration alone, without weights.

    Raises:
        CheckpointError: There is no such model, or transformers does not know its kind.
    """
    import torch
    import transformers

    from espalier.training.models import load_config

    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        listing = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{name} is neither a model nor an adapter; it holds {listing}.")
    config = load_config(name)
    made = (config.architectures or [""])[0]
    with torch.device("meta"):
        if hasattr(transformers, made):
            return getattr(transformers, made)(config)
        return transformers.AutoModel.from_config(config)


def _matched(chosen: Any, selector: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.title = f"{selector}: {len(chosen)} of {len(chosen.whole)} places"
    table.add_column("role", style="cyan", no_wrap=True)
    table.add_column("in → out", justify="right", no_wrap=True)
    table.add_column("path", overflow="fold")
    for site in chosen[:_SHOWN]:
        table.add_row(site.role, f"{site.n_in} → {site.n_out}", site.path)
    if len(chosen) > _SHOWN:
        table.add_row("…", "", f"and {len(chosen) - _SHOWN} more")
    return table


def _plan(model: nn.Module, recipe: Recipe) -> Table:
    """What a recipe would train on this model."""
    import espalier as esp

    before = sum(p.numel() for p in model.parameters())
    try:
        esp.attach(model, recipe, "plan", head=False)
    except NotImplementedError as error:  # an initial value that needs the base's weights
        raise EspalierError(f"{recipe} cannot be counted without the model's weights.") from error
    account = esp.account(model, "plan")
    kept = account.bytes
    rows = [
        ("trained", f"{account.trained:,}", f"{account.trained / before:.3%} of the model"),
        ("kept on disk", _bytes(kept), f"{kept / (4 * before):.3%} of the model in fp32"),
        ("optimiser (AdamW)", _bytes(2 * kept), "two moments in fp32"),
        ("model", f"{before:,}", f"{_bytes(4 * before)} in fp32, {_bytes(2 * before)} in bf16"),
    ]
    return _pairs(str(recipe), rows)


def _bytes(count: float) -> str:
    from espalier.training.memory import in_words

    return in_words(count)


def _pairs(title: str, rows: list[tuple[str, str, str]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False)
    table.title = title
    table.add_column("", style="cyan", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", style="dim", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _card(folder: Path) -> Table:
    """An adapter's card for people."""
    from rich import box
    from rich.table import Table

    from espalier.checkpoint import read_card
    from espalier.recipes import Recipe

    card = read_card(folder)
    extras = card["extras"]
    table = Table(box=box.SIMPLE, show_header=False)
    table.title = f"Adapter in {folder}"
    table.add_column("", style="cyan", no_wrap=True)
    table.add_column("", overflow="fold")
    table.add_row("method", str(Recipe.from_json(card["recipe"])))
    table.add_row("base", f"{card['base']['name'] or 'unnamed'} ({card['base']['class']})")
    size = _bytes(_weights_size(folder))
    table.add_row("trained", f"{card['trained']:,} numbers, {size} on disk")
    table.add_row("head", ", ".join(card["head"]) or "none")
    for name, value in extras.items():
        if value not in (None, "", [], {}):
            table.add_row(name, _short(value))
    return table


def _weights_size(folder: Path) -> int:
    from espalier.checkpoint import WEIGHTS

    paths = (folder / WEIGHTS, folder / "adapter" / WEIGHTS)
    return next(path.stat().st_size for path in paths if path.is_file())


def _short(value: Any, most: int = 300) -> str:
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    elif isinstance(value, dict):
        value = ", ".join(f"{k}: {v}" for k, v in value.items())
    text = str(value)
    return text if len(text) <= most else text[: most - 1] + "…"
