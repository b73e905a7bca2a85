"""Peft's LN_TUNING: trained copies of whole norms, or of any other module.

Written: adapters that train norms. Where only their biases train, the weights are written as the
base has them. Read: copies of any modules, which `PartialTuning` trains parameter by parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from espalier.adapter import Adapter
from espalier.deltas import Delta
from espalier.errors import CheckpointError, SiteError
from espalier.graft import Graft
from espalier.interop.foreign import Foreign, fill, refuse_strangers
from espalier.interop.peft.files import PREFIX, Kind
from espalier.interop.peft.whole import Whole, whole_tensors
from espalier.methods.partial import PartialTuning
from espalier.modules import base_modules
from espalier.places import Sites, sites
from espalier.plain.whole import Replacement, chosen
from espalier.recipes import Recipe
from espalier.verbs import prepare

_WORD = ".ln_tuning_layers."


def _fits(adapter: Adapter) -> bool:
    """Whether an adapter only replaces parameters, and these are vectors, heads left out."""
    copies = [delta for delta in adapter.deltas if delta.site.path not in adapter.head]
    return bool(copies) and all(
        isinstance(delta, Replacement) and all(view.dim() == 1 for view in delta.t.values())
        for delta in copies
    )


def _write(model: nn.Module, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    norms = {site.path for site in sites(model).whole if site.kind == "norm"}
    modules = base_modules(model)
    tensors: dict[str, Tensor] = {}
    tuned: dict[str, None] = {}
    for name, value in whole_tensors(adapter).items():
        path, _, last = name.rpartition(".")
        if path in adapter.head:
            tensors[PREFIX + name] = value
        elif path in norms:
            for key, own in modules[path].state_dict().items():
                tensors.setdefault(f"{PREFIX}{path}{_WORD}{key}", own)
            tensors[f"{PREFIX}{path}{_WORD}{last}"] = value
            tuned[path] = None
        else:
            raise CheckpointError(
                f"peft's LN_TUNING format keeps norms and heads; this adapter trains {name}. Save "
                "it in Espalier's own format, or merge it where it can be merged"
            )
    return {"target_modules": sorted(tuned)}, tensors


def _read(model: nn.Module, foreign: Foreign, name: str) -> tuple[Graft, Adapter]:
    copies: dict[str, str] = {}
    whole = Whole(foreign)
    for key in foreign.file.entries:
        path, found, inner = key.removeprefix(PREFIX).partition(_WORD)
        if found:
            copies[f"{path}.{inner}"] = key
        else:
            whole.add(key)
    modules = base_modules(model)
    refuse_strangers(foreign, model, modules, {name.rpartition(".")[0] for name in copies})
    whole.refuse_strangers(model, modules)
    whole.drop_unchanged(modules)
    heads = whole.heads()
    _refuse_ties(foreign, modules, copies)
    recipe = Recipe((PartialTuning(sites=_selector(model, sites(model), foreign, copies)),))
    graft, adapter = prepare(
        model, recipe, name, head=heads or False, dtype=torch.float32, fresh=False
    )

    def give(delta: Delta, key: str) -> Tensor | None:
        name = f"{delta.site.path}.{key}"
        return foreign.take(copies[name]) if name in copies else whole.value(name)

    fill(adapter, foreign, give)
    return graft, adapter


def _selector(model: nn.Module, places: Sites, foreign: Foreign, copies: dict[str, str]) -> str:
    """The shortest selector for exactly these parameters: norms, last names, or all paths."""
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in copies))
    last = sorted({"*." + path.rpartition(".")[2] for path in paths})
    for short in ("norm", ", ".join(last), ", ".join(paths)):
        try:
            found = chosen(model, places, short)
        except SiteError:
            continue
        if {f"{path}.{name}" for path, name in found} == set(copies):
            return short
    raise CheckpointError(
        f"{foreign.file.path} has copies of {', '.join(paths[:3])} that do not fit this model: "
        "parameters are missing or have no place, or are tied to others that are not in the file"
    )


def _refuse_ties(foreign: Foreign, modules: dict[str, nn.Module], copies: dict[str, str]) -> None:
    """Raise CheckpointError where tied parameters have copies of their own, which differ."""
    first: dict[int, str] = {}
    for name, key in copies.items():
        path, _, last = name.rpartition(".")
        own = modules[path]._parameters.get(last)
        other = first.setdefault(id(own), key)
        if own is not None and not torch.equal(
            foreign.file.tensor(key), foreign.file.tensor(other)
        ):
            raise CheckpointError(
                f"{foreign.file.path}: {name} has a copy of its own, but in this model it is tied "
                "to another parameter with a different one"
            )


KIND = Kind({"exclude_modules", "target_modules"}, _fits, _write, _read)
