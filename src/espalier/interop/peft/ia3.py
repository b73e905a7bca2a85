"""Peft's IA3: vectors that scale what leaves a linear layer, or, where it is listed among the
feed-forward ones, what enters it.

A vector on a slice of a fused layer becomes one of the whole layer, with ones on the other rows;
several on one layer become their product. Both are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from espalier.adapter import Adapter
from espalier.deltas import Delta
from espalier.errors import CheckpointError
from espalier.graft import Graft
from espalier.interop.foreign import Foreign, fill, refuse_strangers
from espalier.interop.lows import by_host
from espalier.interop.peft.files import PREFIX, Kind
from espalier.interop.peft.whole import Whole, head_tensors
from espalier.interop.targets import selector
from espalier.methods.ia3 import IA3
from espalier.modules import base_modules
from espalier.places import Site, Sites, sites
from espalier.plain.scale import ScaleIn, ScaleOut
from espalier.recipes import Recipe
from espalier.verbs import prepare

KNOWN = {
    "exclude_modules", "fan_in_fan_out", "feedforward_modules", "init_ia3_weights",
    "target_modules",
}  # fmt: skip
_WORD = ".ia3_l"


def _fits(adapter: Adapter) -> bool:
    """Whether all changes of an adapter are vectors that scale."""
    changes = [delta for delta in adapter.deltas if not delta.replaces]
    return bool(changes) and all(isinstance(delta, ScaleIn | ScaleOut) for delta in changes)


def _write(model: nn.Module, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    heads = head_tensors(adapter, "IA3")
    hosts = by_host(adapter)
    tensors = {f"{PREFIX}{path}{_WORD}": _vector(here) for path, here in hosts.items()}
    tensors.update({PREFIX + name: value for name, value in heads.items()})
    modules = base_modules(model)
    config = {
        "fan_in_fan_out": any(type(modules[path]).__name__ == "Conv1D" for path in hosts),
        "feedforward_modules": sorted(p for p, here in hosts.items() if _enters(here[0])),
        "init_ia3_weights": True,
        "target_modules": sorted(hosts),
    }
    return config, tensors


def _enters(delta: Delta) -> bool:
    return isinstance(delta, ScaleIn)


def _vector(deltas: list[Delta]) -> Tensor:
    """The vectors of one host as one: (D_out, 1), or (1, D_in) of what enters it."""
    site = deltas[0].site
    if len({_enters(delta) for delta in deltas}) > 1:
        raise CheckpointError(
            f"peft's IA3 scales what enters a layer or what leaves it; at {site.path} this adapter "
            "scales both. Save it in Espalier's own format, or merge it where it can be merged"
        )
    numbers = [next(iter(delta.t.values())).detach() for delta in deltas]
    if _enters(deltas[0]):
        return torch.stack(numbers).prod(0).unsqueeze(0)
    rows = site.rows
    whole = numbers[0].new_ones(rows.groups * rows.width if rows else site.n_out)
    for delta, scale in zip(deltas, numbers, strict=True):
        rows = delta.site.rows
        whole = rows.place(whole, rows.take(whole) * scale) if rows else whole * scale
    return whole.unsqueeze(1)


def _read(model: nn.Module, foreign: Foreign, name: str) -> tuple[Graft, Adapter]:
    vectors, whole = _sorted(foreign)
    modules = base_modules(model)
    refuse_strangers(foreign, model, modules, set(vectors))
    whole.refuse_strangers(model, modules)
    whole.drop_unchanged(modules)
    heads = whole.heads()
    recipe = _recipe(sites(model), foreign, vectors)
    graft, adapter = prepare(
        model, recipe, name, head=heads or False, dtype=torch.float32, fresh=False
    )

    def give(delta: Delta, key: str) -> Tensor | None:
        path = delta.site.path
        return (
            whole.value(f"{path}.{key}")
            if delta.replaces
            else foreign.take(vectors[path]).flatten()
        )

    fill(adapter, foreign, give)
    return graft, adapter


def _sorted(foreign: Foreign) -> tuple[dict[str, str], Whole]:
    """Keys of the vectors by path, and everything else."""
    vectors: dict[str, str] = {}
    whole = Whole(foreign)
    for key in foreign.file.entries:
        if key.endswith(_WORD):
            vectors[key.removeprefix(PREFIX).removesuffix(_WORD)] = key
        else:
            whole.add(key)
    return vectors, whole


def _recipe(places: Sites, foreign: Foreign, vectors: Mapping[str, str]) -> Recipe:
    hosts = {
        site.path: site
        for site in places.whole
        if site.kind in ("linear", "conv1d") and not (site.rows or site.span)
    }
    leaving: list[str] = []
    entering: list[str] = []
    for path, key in vectors.items():
        shape, site = foreign.file.entries[key].shape, hosts.get(path)
        if site is None:
            raise CheckpointError(
                f"{foreign.file.path} scales {path}, which is no linear layer of this model; "
                "Espalier's IA3 takes linear layers"
            )
        (leaving if _leaves(site, shape, foreign) else entering).append(path)
    settings = {
        key: selector(places, paths) if paths else ""
        for key, paths in (("sites", leaving), ("hidden", entering))
    }
    return Recipe((IA3(**settings),))


def _leaves(site: Site, shape: tuple[int, ...], foreign: Foreign) -> bool:
    """Whether a vector scales what leaves a layer, which its shape tells."""
    if shape not in ((site.n_out, 1), (1, site.n_in)):
        raise CheckpointError(
            f"{foreign.file.path}: the vector of {site.path} has shape {tuple(shape)}, this model "
            f"needs {(site.n_out, 1)} or {(1, site.n_in)}"
        )
    return shape == (site.n_out, 1)


KIND = Kind(KNOWN, _fits, _write, _read)
