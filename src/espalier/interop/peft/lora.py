"""Peft's LORA: pairs of matrices, with use_dora a vector of lengths beside each pair.

Written: low-rank deltas, biases beside them and whole modules (heads). PiSSA goes out as the plain
LoRA of twice the rank, LoRA-FA as a LoRA. Where some layers are DoRA's, all must be: the others
get the lengths that their rows have.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.adapter import Adapter
from espalier.deltas import Delta
from espalier.errors import CheckpointError
from espalier.graft import Graft
from espalier.interop.foreign import Foreign, fill, refuse_strangers
from espalier.interop.lows import (
    Low,
    by_host,
    is_dora,
    is_low,
    joined,
    loras,
    magnitudes,
    stretched,
)
from espalier.interop.peft.files import PREFIX, Kind
from espalier.interop.peft.whole import Whole, saved_key, whole_tensors
from espalier.interop.targets import pattern
from espalier.methods.lora import LoRA
from espalier.modules import base_modules
from espalier.places import Sites, sites
from espalier.recipes import Recipe
from espalier.verbs import prepare

KNOWN = {
    "alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
    "qalora_group_size", "r", "rank_pattern", "runtime_config", "target_modules", "use_dora",
    "use_rslora",
}  # fmt: skip
# Starts that leave the base as it was; the others (PiSSA, OLoRA, LoftQ, …) rewrite its weights.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mini_lora")
_WORDS = {
    ".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_embedding_A": "a",
    ".lora_embedding_B": "b", ".lora_magnitude_vector": "m", ".lora_magnitude_vector.weight": "m",
}  # fmt: skip


# ---------------------------------------------------------------------------------------- writing


def _write(model: nn.Module, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    deltas = by_host(adapter)
    lows = {path: joined(here) for path, here in deltas.items()}
    tensors: dict[str, Tensor] = {}
    for path, one in lows.items():
        word = "lora_embedding_%s" if one.table else "lora_%s.weight"
        tensors[f"{PREFIX}{path}.{word % 'A'}"] = one.a
        tensors[f"{PREFIX}{path}.{word % 'B'}"] = one.b
    modules = base_modules(model)
    dora = is_dora(adapter)
    for path, here in deltas.items() if dora else ():
        tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = magnitudes(
            modules[path], here, lows[path]
        )
    whole = whole_tensors(adapter)
    tensors.update({saved_key(name, lows): value for name, value in whole.items()})
    transposed = any(type(modules[path]).__name__ == "Conv1D" for path in lows)
    config = _config(adapter, lows, _biases(adapter, whole, lows))
    return {**config, "use_dora": dora, "fan_in_fan_out": transposed}, tensors


def _biases(adapter: Adapter, whole: Mapping[str, Any], lows: Mapping[str, Any]) -> str:
    """Peft's word for the biases that train beside the changes."""
    rest = [name for name in whole if name.rpartition(".")[0] not in adapter.head]
    other = next((n for n in rest if not n.endswith(".bias") and n != "bias"), None)
    if other is not None:
        raise CheckpointError(
            "peft's LoRA format keeps low-rank changes, biases and heads; this adapter replaces "
            f"{other}. Save it in Espalier's own format"
        )
    adapted = all(name.rpartition(".")[0] in lows for name in rest)
    return "none" if not rest else "lora_only" if adapted else "all"


def _config(adapter: Adapter, lows: Mapping[str, Low], bias: str) -> dict[str, Any]:
    loras = [m for m in adapter.recipe.methods if isinstance(m, LoRA)]
    # With rslora peft divides by the root of the rank.
    rslora = bool(loras) and all(m.rslora for m in loras)
    ranks = {path: one.rank for path, one in lows.items()}
    alphas = {
        path: one.scale * (one.rank**0.5 if rslora else one.rank) for path, one in lows.items()
    }
    rank, alpha = (statistics.mode(values.values()) for values in (ranks, alphas))
    return {
        "alpha_pattern": {path: a for path, a in alphas.items() if a != alpha},
        "bias": bias,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": max((m.dropout for m in loras), default=0.0),
        "r": rank,
        "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
        "target_modules": sorted(lows),
        "use_rslora": rslora,
    }


# ---------------------------------------------------------------------------------------- reading


def _read(model: nn.Module, foreign: Foreign, name: str) -> tuple[Graft, Adapter]:
    refuse_rewritten(foreign.config, foreign.folder)
    pairs, whole = _sorted(foreign)
    modules = base_modules(model)
    refuse_strangers(foreign, model, modules, set(pairs))
    whole.refuse_strangers(model, modules)
    whole.drop_unchanged(modules)
    heads = whole.heads()
    recipe = _recipe(sites(model), foreign, pairs)
    graft, adapter = prepare(
        model, recipe, name, head=heads or False, dtype=torch.float32, fresh=False
    )

    def give(delta: Delta, key: str) -> Tensor | None:
        path = delta.site.path
        if delta.replaces:
            return whole.value(f"{path}.{key}")
        value = foreign.take(pairs[path][key])
        return stretched(value, modules[path], delta.site) if key == "m" else value

    fill(adapter, foreign, give)
    return graft, adapter


def refuse_rewritten(config: Mapping[str, Any], where: Path) -> None:
    """Raise CheckpointError where a start has rewritten the base that the numbers belong to."""
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise CheckpointError(
            f"{where}: init_lora_weights={start!r} rewrites the base's weights; convert the "
            "adapter to a plain LoRA with peft first (path_initial_model_for_weight_conversion)"
        )


def _sorted(foreign: Foreign) -> tuple[dict[str, dict[str, str]], Whole]:
    """Keys of each layer's matrices by path, and everything else."""
    pairs: dict[str, dict[str, str]] = {}
    whole = Whole(foreign)
    for key in foreign.file.entries:
        inner = key.removeprefix(PREFIX)
        word = next((word for word in _WORDS if inner.endswith(word)), None)
        if word is not None:
            pairs.setdefault(inner.removesuffix(word), {})[_WORDS[word]] = key
        elif ".lora_" in inner:
            raise CheckpointError(f"{foreign.file.path}: cannot place the tensor {key!r}")
        else:
            whole.add(key)
    wanted = {"a", "b", "m"} if foreign.config.get("use_dora") else {"a", "b"}
    for path, keys in pairs.items():
        if set(keys) != wanted:
            raise CheckpointError(
                f"{foreign.file.path}: {path} has {' and '.join(sorted(keys))}, not "
                f"{' and '.join(sorted(wanted))}"
            )
    return pairs, whole


def _recipe(places: Sites, foreign: Foreign, pairs: Mapping[str, Mapping[str, str]]) -> Recipe:
    config = foreign.config
    layers = {
        path: (
            foreign.file.entries[keys["a"]].shape[0],
            pattern(config, "alpha_pattern", path, "lora_alpha"),
        )
        for path, keys in pairs.items()
    }
    return loras(
        places,
        layers,
        bias=config.get("bias") or "none",
        dropout=config.get("lora_dropout") or 0.0,
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
    )


KIND = Kind(KNOWN, is_low, _write, _read)
