"""Peft's ADALORA: triplets, with the rows that its last pruning left where it has pruned.

There the change is P diag(E) Q · α / (r + 1e-5), r the rank that all layers started with; here it
is · α / r, and E takes up the difference. A folder is read as an AdaLoRA with zeros in the place of
what was pruned, which stays pruned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from espalier.adapter import Adapter
from espalier.deltas import Delta
from espalier.errors import CheckpointError
from espalier.graft import Graft
from espalier.interop.foreign import Foreign, fill, refuse_strangers
from espalier.interop.lows import by_host
from espalier.interop.peft.files import PREFIX, Kind
from espalier.interop.peft.lora import KNOWN as LORA_KNOWN
from espalier.interop.peft.lora import refuse_rewritten
from espalier.interop.peft.whole import Whole, head_tensors
from espalier.interop.targets import selector
from espalier.methods.adalora import AdaLoRA
from espalier.modules import base_modules
from espalier.places import Sites, sites
from espalier.plain.adaptive import Triplets, standing
from espalier.recipes import Recipe
from espalier.verbs import prepare

# Of LORA's those that peft heeds here too, and its own.
KNOWN = LORA_KNOWN - {"alpha_pattern", "use_dora", "use_rslora"} | {
    "beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "target_r", "tfinal", "tinit",
    "total_step",
}  # fmt: skip
_WORDS = {".lora_A": "q", ".lora_B": "p", ".lora_E": "e"}
_MORE = 1e-5  # what peft adds to the rank that it divides by
_SLACK = 1e-6  # a share of steps that is whole but for rounding
_STEPS = 1000  # of a schedule whose length is not known any more


class _Host(NamedTuple):
    """The triplets of a whole host: p (D_out, R), e (R,) with the scale in it, q (R, D_in)."""

    p: Tensor
    e: Tensor
    q: Tensor
    stands: Tensor


def _fits(adapter: Adapter) -> bool:
    """Whether all changes of an adapter are made of triplets."""
    changes = [delta for delta in adapter.deltas if not delta.replaces]
    return bool(changes) and all(isinstance(delta, Triplets) for delta in changes)


def _write(model: nn.Module, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    method = next(m for m in adapter.recipe.methods if isinstance(m, AdaLoRA))
    heads = head_tensors(adapter, "AdaLoRA")
    hosts = {path: _joined(here) for path, here in by_host(adapter).items()}
    rank = max(len(host.e) for host in hosts.values())
    alpha = method.alpha * rank / method.rank
    tensors = {PREFIX + name: value for name, value in heads.items()}
    pattern: dict[str, list[bool]] = {}
    for path, host in hosts.items():
        keep = host.stands
        tensors[f"{PREFIX}{path}.lora_A"] = host.q[keep]
        tensors[f"{PREFIX}{path}.lora_B"] = host.p[:, keep]
        tensors[f"{PREFIX}{path}.lora_E"] = (host.e * ((rank + _MORE) / alpha))[keep].unsqueeze(1)
        pattern[f"{path}.lora_E"] = keep.tolist() + [False] * (rank - len(keep))
    pruned = not all(all(keep) for keep in pattern.values())
    modules = base_modules(model)
    transposed = any(type(modules[path]).__name__ == "Conv1D" for path in hosts)
    config = _schedule(method, next(iter(adapter.regimes)).total or _STEPS)
    return {
        **config,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
        "init_r": rank,
        "lora_alpha": alpha,
        "lora_dropout": method.dropout,
        "rank_pattern": pattern if pruned else None,
        "target_modules": sorted(hosts),
    }, tensors


def _schedule(method: AdaLoRA, steps: int) -> dict[str, Any]:
    return {
        "beta1": method.beta1,
        "beta2": method.beta2,
        "deltaT": method.interval,
        "orth_reg_weight": method.orthogonality,
        "target_r": method.target,
        "tfinal": int(method.end * steps + _SLACK),
        "tinit": int(method.start * steps + _SLACK),
        "total_step": steps,
    }


def _joined(deltas: list[Delta]) -> _Host:
    """The triplets of one host, those of its slices side by side."""
    parts: list[_Host] = []
    for delta in deltas:
        assert isinstance(delta, Triplets)
        t = {key: view.detach() for key, view in delta.t.items()}
        p, rows = t["p"], delta.site.rows
        if rows is not None:
            p = rows.place(p.new_zeros(p.shape[1], rows.groups * rows.width), p.T).T
        parts.append(_Host(p, t["e"] * delta.scale, t["q"], standing(t)))
    return _Host(
        torch.cat([part.p for part in parts], dim=1),
        torch.cat([part.e for part in parts]),
        torch.cat([part.q for part in parts]),
        torch.cat([part.stands for part in parts]),
    )


def _read(model: nn.Module, foreign: Foreign, name: str) -> tuple[Graft, Adapter]:
    refuse_rewritten(foreign.config, foreign.folder)
    layers, whole = _sorted(foreign)
    modules = base_modules(model)
    refuse_strangers(foreign, model, modules, set(layers))
    whole.refuse_strangers(model, modules)
    whole.drop_unchanged(modules)
    heads = whole.heads()
    recipe = _recipe(sites(model), foreign, layers)
    graft, adapter = prepare(
        model, recipe, name, head=heads or False, dtype=torch.float32, fresh=False
    )
    rank = _rank(foreign)
    kept = {path: _kept(foreign, path, keys["e"], rank) for path, keys in layers.items()}

    def give(delta: Delta, key: str) -> Tensor | None:
        path = delta.site.path
        if delta.replaces:
            return whole.value(f"{path}.{key}")
        keep = kept[path]
        if key == "stays":
            return keep.float()
        found = torch.zeros(delta.trained[key].shape)
        if key in layers[path]:
            value = foreign.take(layers[path][key])
            if key == "p":
                found[:, keep] = value
            else:
                found[keep] = value.flatten() * (rank / (rank + _MORE)) if key == "e" else value
        return found

    fill(adapter, foreign, give)
    return graft, adapter


def _rank(foreign: Foreign) -> int:
    return int(foreign.config.get("init_r") or 12)


def _sorted(foreign: Foreign) -> tuple[dict[str, dict[str, str]], Whole]:
    """Keys of each layer's triplets by path, and everything else."""
    layers: dict[str, dict[str, str]] = {}
    whole = Whole(foreign)
    for key in foreign.file.entries:
        inner = key.removeprefix(PREFIX)
        word = next((word for word in _WORDS if inner.endswith(word)), None)
        if word is not None:
            layers.setdefault(inner.removesuffix(word), {})[_WORDS[word]] = key
        elif ".lora_" in inner:
            raise CheckpointError(f"{foreign.file.path}: cannot place the tensor {key!r}")
        else:
            whole.add(key)
    for path, keys in layers.items():
        if set(keys) != set(_WORDS.values()):
            held = ", ".join(word for word, key in _WORDS.items() if key in keys)
            raise CheckpointError(f"{foreign.file.path}: {path} has {held} alone")
    return layers, whole


def _kept(foreign: Foreign, path: str, key: str, rank: int) -> Tensor:
    """Which of the first triplets (R,) of a layer the file has."""
    patterns: Mapping[str, list[bool]] = foreign.config.get("rank_pattern") or {}
    keep = torch.tensor(patterns.get(f"{path}.lora_E", [True] * rank), dtype=torch.bool)
    held = foreign.file.entries[key].shape[0]
    if len(keep) != rank or int(keep.sum()) != held:
        raise CheckpointError(
            f"{foreign.file.path}: {path} has {held} of {rank} triplets, its rank_pattern speaks "
            f"of {int(keep.sum())} of {len(keep)}"
        )
    return keep


def _recipe(places: Sites, foreign: Foreign, layers: Mapping[str, Any]) -> Recipe:
    config, rank = foreign.config, _rank(foreign)
    steps = config.get("total_step") or _STEPS
    method = AdaLoRA(
        rank=rank,
        target=min(rank, int(config.get("target_r") or 8)),
        alpha=float(config.get("lora_alpha") or rank),
        dropout=config.get("lora_dropout") or 0.0,
        sites=selector(places, layers),
        orthogonality=float(config.get("orth_reg_weight", 0.5)),
        start=(config.get("tinit") or 0) / steps,
        end=(config.get("tfinal") or 0) / steps,
        interval=int(config.get("deltaT") or 1),
        beta1=config.get("beta1") or 0.85,
        beta2=config.get("beta2") or 0.85,
    )
    return Recipe((method,))


KIND = Kind(KNOWN, _fits, _write, _read)
