"""Adapters on disk: one safetensors file with the recipe in its header, and a JSON to read.

    folder/adapter.safetensors   the numbers, and everything needed to attach them again
    folder/adapter.json          the same card for people and other programs

The card says what the adapter is (recipe, head), which base it was trained on (name, class, a few
of its values), and whatever a trainer wants to travel with it (`extras`: labels, chat template, …).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from espalier import container, identity
from espalier.adapter import Adapter
from espalier.container import Container
from espalier.errors import CheckpointError, SettingError
from espalier.graft import Graft, find, get
from espalier.modules import base_modules, one_walk, unwrap
from espalier.recipes import Recipe
from espalier.verbs import install, prepare

WEIGHTS = "adapter.safetensors"
CARD = "adapter.json"
PEFT_CONFIG = "adapter_config.json"
FORMAT = 1


def save(
    model: nn.Module,
    name: str,
    folder: str | Path,
    *,
    format: Literal["espalier", "peft", "diffusers"] = "espalier",
    extras: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter into a folder; returns the folder.

    Args:
        model: A model with adapters.
        name: Which of them.
        folder: Made if need be. Files appear whole or not at all.
        format: "espalier"; "peft" for a folder that huggingface/peft and vLLM read; "diffusers"
            for one that a pipeline's `load_lora_weights` takes.
        extras: JSON data to keep in the card.

    Raises:
        AdapterError: No such adapter, or one is merged into the base.
        CheckpointError: The folder cannot be written, or the format has no form for this adapter.
        SettingError: An unknown format.
    """
    model = unwrap(model)
    adapter = get(model, name)
    find(model).refuse_merged()
    folder = Path(folder)
    if format == "peft":
        from espalier.interop.peft import write_peft

        write_peft(model, adapter, folder)
    elif format == "diffusers":
        from espalier.interop.diffusers import write_diffusers

        write_diffusers(model, adapter, folder)
    elif format == "espalier":
        card = _card(model, adapter, extras or {})
        text = json.dumps(card, ensure_ascii=False)
        runs = adapter.runs.values()
        container.write(folder / WEIGHTS, adapter.named(), runs, {"espalier": text})
        pretty = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
        container.write_text(folder / CARD, pretty)
    else:
        raise SettingError(f"format is 'espalier', 'peft' or 'diffusers', not {format!r}")
    return folder


def _card(model: nn.Module, adapter: Adapter, extras: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "recipe": adapter.recipe.to_json(),
        "head": list(adapter.head),
        "base": identity.of(model, without=adapter.head),
        "trained": sum(flat.numel() for flat in adapter.flat.values()),
        "extras": dict(extras),
    }


def read_card(folder: str | Path) -> dict[str, Any]:
    """The card of a saved adapter: its recipe, head, base and extras.

    Raises:
        CheckpointError: The folder holds no adapter of ours, or a damaged one.
    """
    return open_saved(folder)[1]


def open_saved(folder: str | Path) -> tuple[Container, dict[str, Any]]:
    """A saved adapter's tensors, read when asked for by their labels, and its card.

    Raises:
        CheckpointError: The folder holds no adapter of ours, or a damaged one.
    """
    return _read(_local(str(folder)))


def _read(folder: Path) -> tuple[Container, dict[str, Any]]:
    opened = container.open_file(_weights_in(folder))
    text = opened.metadata.get("espalier")
    if text is None:
        raise CheckpointError(f"{opened.path} is a safetensors file but no adapter of Espalier's")
    try:
        card = json.loads(text)
        later = card["format"] > FORMAT
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{opened.path}: the card in its header is damaged") from None
    if later:
        raise CheckpointError(
            f"{opened.path} has format {card['format']}, this Espalier reads up to {FORMAT}; "
            "pip install -U espalier"
        )
    return opened, card


def _weights_in(folder: Path) -> Path:
    if folder.is_file():
        return folder
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if (folder / "adapter" / WEIGHTS).is_file():  # a run folder
        return folder / "adapter" / WEIGHTS
    if (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file():
        raise CheckpointError(
            f"the run in {folder} has not ended, so it holds no adapter yet; go on with "
            f"espalier train --config {folder / 'config.yaml'} --resume"
        )
    names = sorted(entry.name for entry in folder.iterdir())
    pickles = [n for n in names if n.endswith(container.PICKLES)]
    if pickles:
        return folder / pickles[0]  # refused by name when opened
    listing = ", ".join(names[:8]) or "nothing"
    raise CheckpointError(f"{folder} holds no {WEIGHTS}; it holds {listing}")


def load(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    *,
    trainable: bool = False,
    check_base: bool = True,
) -> str:
    """Attach a saved adapter and make it the active one; returns its name.

    Args:
        model: The base that it was trained on; it may hold other adapters.
        folder: Espalier's, PEFT's or diffusers' folder, a run folder, a file of Espalier's or
            diffusers', or a hub id ("owner/name").
        name: The name to attach it under; the folder's own by default.
        trainable: Go on training it.
        check_base: Compare the base's values with those noted when it was saved.

    Raises:
        CheckpointError: Missing, damaged, foreign, or made for another base; the model is as
            it was then.
    """
    from espalier.interop.diffusers import read_diffusers, weights_in

    model = unwrap(model)
    path = _local(str(folder))
    if name is None:
        name = path.resolve().stem if path.is_file() else path.resolve().name
    with one_walk(model):
        if (path / PEFT_CONFIG).is_file():
            from espalier.interop.peft import read_peft

            graft, adapter = read_peft(model, path, name)
        elif file := weights_in(path):
            graft, adapter = read_diffusers(model, file, name)
        else:
            opened, card = _read(path)
            if check_base:
                identity.check(model, card["base"], opened.path)
            graft, adapter = _rebuild(model, opened, card, name)
        if not trainable:
            adapter.requires_grad_(False)
        install(model, graft, adapter)
    return name


def _rebuild(
    model: nn.Module, opened: Container, card: dict[str, Any], name: str
) -> tuple[Graft, Adapter]:
    """The adapter of a card, filled with the file's numbers, not yet in the model."""
    recipe = Recipe.from_json(card["recipe"])
    known = base_modules(model)
    lacking = [path for path in card["head"] if path not in known]
    if lacking:
        raise CheckpointError(
            f"{opened.path} brings a task head at {', '.join(lacking)}, which this "
            f"{type(model).__name__} lacks; it was trained on a {card['base']['class']}"
        )
    dtypes = {e.dtype for e in opened.entries.values() if e.dtype.is_floating_point}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    head = card["head"] or False
    graft, adapter = prepare(model, recipe, name, head=head, dtype=dtype, fresh=None)
    _compare(adapter, opened, card)
    for kind, flat in adapter.runs.items():
        slots = adapter.slots[kind]
        entries = [opened.entries[slot.label] for slot in slots]
        first, width = entries[0].start, flat.element_size()
        in_order = {entry.dtype for entry in entries} == {flat.dtype} and (
            [entry.start - first for entry in entries] == [slot.start * width for slot in slots]
        )
        with torch.no_grad():
            if in_order and flat.is_cpu:
                opened.read(first, entries[-1].stop, flat.data)
            elif in_order:
                run = torch.empty_like(flat, device="cpu")
                opened.read(first, entries[-1].stop, run)
                flat.copy_(run)
            else:
                for slot in slots:
                    slot.of(flat.data).copy_(opened.tensor(slot.label))
    return graft, adapter


def _compare(adapter: Adapter, opened: Container, card: dict[str, Any]) -> None:
    """Strict keys: the file and the adapter that its recipe builds here must agree exactly."""
    wanted = {s.label: s.shape for slots in adapter.slots.values() for s in slots}
    held = {name: entry.shape for name, entry in opened.entries.items()}
    if wanted == held:
        return
    problems = [f"{n} is missing in the file" for n in wanted if n not in held]
    problems += [f"{n} has no place in this model" for n in held if n not in wanted]
    problems += [
        f"{n} has shape {held[n]} in the file, {shape} here"
        for n, shape in wanted.items()
        if n in held and held[n] != shape
    ]
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    raise CheckpointError(
        f"{opened.path} does not fit this model: {'; '.join(problems[:3])}{more}. It was "
        f"trained on {card['base']['name'] or 'an unnamed base'} ({card['base']['class']})"
    )


def _local(folder: str) -> Path:
    """A local folder; a hub id is fetched (safetensors and JSON only)."""
    path = Path(folder)
    here = path.exists() or path.parent.is_dir() or folder.startswith("~")
    if here or folder.count("/") != 1:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(snapshot_download(folder, allow_patterns=["*.safetensors", "*.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"there is no folder {folder}, and the hub did not give it: {type(error).__name__}"
        ) from error
