"""The way of soft prompts through a model: the module that takes them in, and where they end."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import nn

from espalier.errors import SiteError
from espalier.modules import base_modules

if TYPE_CHECKING:
    from espalier.deltas import Delta
    from espalier.places import Site, Sites


@dataclass(frozen=True, slots=True)
class Route:
    """The modules by which prompts enter and leave a model.

    Attributes:
        stack: Embeds the text, or the image, and runs its blocks.
        door: The word embedding; of images the first block.
        body: Gives what a pooler within the stack reads: prompts end there already.
        pooler: The pooler itself, where no module of its own runs the blocks.
        reader: The decoder that reads what the stack gives; prompts do not end then.
        images: Whether the stack reads images.
    """

    stack: str
    door: str
    body: str | None
    pooler: str | None
    reader: str | None
    images: bool


def route(model: nn.Module, places: Sites, delta: Delta) -> Route:
    """How a delta's words enter and leave a model.

    Raises:
        SiteError: They cannot: the model has no module that takes ids and runs the blocks, or
            nothing would ever see words at some of the places asked for.
    """
    site, modules = delta.site, base_modules(model)
    images = site.kind == "block"
    whole = places.whole
    blocks = [s.path for s in whole if s.role == "block" and s.stack == site.stack]
    if not blocks:
        raise SiteError(
            f"{places.notes.model} has no blocks that the words of a prompt could enter"
        )
    patches = [s.path for s in whole if s.role == "conv" and s.stack == site.stack]
    stack = _around(modules, [*blocks, *(patches if images else [site.path])])
    takes = names(modules[stack])
    if not images and "input_ids" not in takes:
        raise SiteError(
            f"a prompt cannot enter {places.notes.model}: {stack or 'its root'}, which embeds the "
            f"text and runs the blocks, takes {', '.join(takes) or 'nothing by name'}, no input_ids"
        )
    _refuse_unseen(delta, images)
    body = _child(stack, blocks[-1])
    body = None if isinstance(modules[body], nn.ModuleList) else body
    pooler = f"{_below(stack)}pooler" if f"{_below(stack)}pooler" in modules else None
    reader = _reader(modules, whole, site)
    return Route(
        stack,
        site.path,
        body if (pooler or images) and not reader else None,
        pooler if not (body or reader) else None,
        reader,
        images,
    )


def _refuse_unseen(delta: Delta, images: bool) -> None:
    _, between, after = delta.gaps
    if images and (between or after):
        raise SiteError(f"an image has no segments: template {delta.gaps} must be (length, 0, 0)")
    if after and delta.site.stack == "decoder":
        raise SiteError(
            f"template {delta.gaps} puts {after} words after the text, where no token of a decoder "
            "sees them; put them before it or between its segments"
        )


def _reader(modules: Mapping[str, nn.Module], places: Sites, site: Site) -> str | None:
    """The decoder that reads what an encoder with prompts gives."""
    blocks = [s.path for s in places if s.role == "block" and s.stack == "decoder"]
    if site.stack != "encoder" or not blocks:
        return None
    words = [s.path for s in places if s.role == "embedding" and s.stack == "decoder"]
    reader = _around(modules, [*blocks, *words])
    if "encoder_attention_mask" not in names(modules[reader]):
        raise SiteError(f"the decoder {reader} takes no mask of what the encoder gives it")
    return reader


def encoders(model: nn.Module, places: Sites) -> dict[str, str]:
    """Path by name of each stack beside a decoder's: `generate` calls an encoder by itself."""
    blocks: dict[str, list[str]] = {}
    for site in places.whole:
        if site.role == "block":
            blocks.setdefault(site.stack, []).append(site.path)
    if blocks.pop("decoder", None) is None:
        return {}
    modules = base_modules(model) if blocks else {}
    found = {stack: _around(modules, paths) for stack, paths in blocks.items()}
    return {stack: path for stack, path in found.items() if path}


def _around(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> str:
    """The innermost module that can be called and holds all of these."""
    split = [path.split(".")[:-1] for path in paths]
    common: list[str] = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    while isinstance(modules[".".join(common)], nn.ModuleList | nn.ModuleDict):
        common.pop()
    return ".".join(common)


def _below(path: str) -> str:
    return f"{path}." if path else ""


def _child(path: str, inner: str) -> str:
    """The child of `path` on the way to `inner`."""
    below = _below(path)
    return below + inner[len(below) :].partition(".")[0]


def names(module: nn.Module) -> tuple[str, ...]:
    """What a module's forward takes by name."""
    return _names(type(module).forward)


@lru_cache(maxsize=256)
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(forward).parameters.values()
    return tuple(p.name for p in found if p.kind in kinds)[1:]


def positions(
    model: nn.Module, modules: Mapping[str, nn.Module], places: Sites, stack: str
) -> int | None:
    """How many positions the stack's table of positions has; None where it has no table."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    stated = int(getattr(text, "max_position_embeddings", None) or 0)
    for site in places.whole if stated else ():
        inside = site.role == "embedding.extra" and site.path.startswith(_below(stack))
        if inside and site.n_in >= stated:
            # With a padding id, positions are counted from it on: the first rows serve no word.
            padding = getattr(modules[site.path], "padding_idx", None)
            return stated - (0 if padding is None else int(padding) + 1)
    return None
