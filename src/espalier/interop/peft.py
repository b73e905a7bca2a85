"""huggingface/peft's LoRA folders, both ways: adapter_config.json + adapter_model.safetensors.

Written: whatever consists of plain low-rank deltas, biases beside them and whole modules (heads).
A slice of a fused layer becomes a change of the whole layer with zero rows elsewhere; several
low-rank deltas on one layer become one of the summed rank. Both are exact.

Read: every LoRA whose settings we know; any other setting raises by its name, since dropping one
silently loads a different model.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier import container
from espalier.adapter import Adapter
from espalier.container import Container
from espalier.deltas import Delta
from espalier.errors import CheckpointError, SiteError
from espalier.graft import Graft
from espalier.methods.lora import LoRA
from espalier.modules import base_modules
from espalier.places import Site, Sites, sites
from espalier.plain.lowrank import LowRank, LowRankConv, LowRankEmbedding
from espalier.recipes import Recipe
from espalier.verbs import prepare

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# The last part of a transformers class name says what peft calls the task.
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# Settings that say nothing about how saved numbers act, or that we act upon.
KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Starts that leave the base as it was; the others (PiSSA, OLoRA, LoftQ, …) rewrite its weights.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mini_lora")


@dataclass(slots=True)
class Low:
    """One peft LoRA entry: s·B·A on a whole host."""

    a: Tensor
    b: Tensor
    scale: float
    table: bool  # on an embedding, where peft names the tensors otherwise

    @property
    def rank(self) -> int:
        """Width of the bottleneck."""
        return self.a.shape[0]


def write_peft(model: nn.Module, adapter: Adapter, folder: Path) -> None:
    """Write an adapter as a peft LoRA folder.

    Raises:
        CheckpointError: peft has no form for one of the deltas, or the folder cannot be written.
    """
    lows: dict[str, list[Low]] = {}
    whole: dict[str, Tensor] = {}
    for delta in adapter.deltas:
        path = delta.site.path
        if delta.replaces:
            whole.update({f"{path}.{name}": v.detach() for name, v in delta.t.items()})
        else:
            lows.setdefault(path, []).append(_low(delta))
    saved, biases = _sort_whole(adapter, whole, lows)
    if not lows:
        raise CheckpointError(
            "peft's LoRA format keeps low-rank changes; this adapter has none. Save it in "
            "Espalier's own format, or merge it into the base"
        )
    tensors: dict[str, Tensor] = {}
    entries = {path: _joined(parts) for path, parts in lows.items()}
    for path, low in entries.items():
        word = "lora_embedding_%s" if low.table else "lora_%s.weight"
        tensors[f"{PREFIX}{path}.{word % 'A'}"] = low.a
        tensors[f"{PREFIX}{path}.{word % 'B'}"] = low.b
    for name, value in whole.items():
        path, _, key = name.rpartition(".")
        inner = f"{path}.base_layer.{key}" if path in lows else name
        tensors[PREFIX + inner] = value
    config = _config(model, adapter, entries, saved, biases)
    ordered = {name: tensors[name].contiguous() for name in sorted(tensors)}
    container.write(folder / WEIGHTS, ordered.items(), ordered.values(), {"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    container.write_text(folder / CONFIG, text)


def _low(delta: Delta) -> Low:
    """A delta as a low-rank change of its whole host."""
    if not isinstance(delta, LowRank | LowRankConv | LowRankEmbedding):
        raise CheckpointError(
            f"peft's LoRA format has no form for {type(delta).__name__} at {delta.site.path}; "
            "save it in Espalier's own, or merge it into the base"
        )
    a, b = delta.t["a"].detach(), delta.t["b"].detach()
    rows = delta.site.rows
    if rows is not None:
        b = rows.place(b.new_zeros(b.shape[1], rows.groups * rows.width), b.T).T
    return Low(a, b, delta.scale, isinstance(delta, LowRankEmbedding))


def _joined(parts: list[Low]) -> Low:
    """Several changes of one host as one: ranks add up, scales move into B."""
    if len(parts) == 1:
        return parts[0]
    a = torch.cat([low.a for low in parts])
    b = torch.cat([low.b * low.scale for low in parts], dim=1)
    return Low(a, b, 1.0, parts[0].table)


def _sort_whole(
    adapter: Adapter, whole: Mapping[str, Tensor], lows: Mapping[str, Any]
) -> tuple[list[str], str]:
    """(modules that are saved whole, peft's word for the biases that train)."""
    saved = list(adapter.head)
    rest = [name for name in whole if name.rpartition(".")[0] not in saved]
    if any(not name.endswith(".bias") and name != "bias" for name in rest):
        raise CheckpointError(
            f"peft's LoRA format keeps low-rank changes, biases and heads; this adapter replaces "
            f"{next(n for n in rest if not n.endswith('bias'))}. Save it in Espalier's own format"
        )
    adapted = all(name.rpartition(".")[0] in lows for name in rest)
    return saved, "none" if not rest else "lora_only" if adapted else "all"


def _config(
    model: nn.Module, adapter: Adapter, entries: Mapping[str, Low], saved: list[str], bias: str
) -> dict[str, Any]:
    loras = [m for m in adapter.recipe.methods if isinstance(m, LoRA)]
    # With rslora peft divides by the root of the rank.
    rslora = bool(loras) and all(m.rslora for m in loras)
    ranks = {path: low.rank for path, low in entries.items()}
    alphas = {
        path: low.scale * (low.rank**0.5 if rslora else low.rank) for path, low in entries.items()
    }
    rank, alpha = (statistics.mode(values.values()) for values in (ranks, alphas))
    config = getattr(model, "config", None)
    name = type(model).__name__
    modules = base_modules(model)
    return {
        "alpha_pattern": {path: a for path, a in alphas.items() if a != alpha},
        "base_model_name_or_path": str(getattr(config, "_name_or_path", "") or "") or None,
        "bias": bias,
        "fan_in_fan_out": any(type(modules[path]).__name__ == "Conv1D" for path in entries),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": max((m.dropout for m in loras), default=0.0),
        "modules_to_save": saved or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
        "target_modules": sorted(entries),
        "task_type": next((task for end, task in TASKS.items() if name.endswith(end)), None),
        "use_dora": False,
        "use_rslora": rslora,
    }


@dataclass(slots=True)
class Foreign:
    """A peft folder, sorted: low-rank pairs, whole modules, biases."""

    config: dict[str, Any]
    file: Container
    pairs: dict[str, dict[str, str]] = field(default_factory=dict)  # path → {"a": key, "b": key}
    whole: dict[str, str] = field(default_factory=dict)  # parameter → key in the file
    spare: set[str] = field(default_factory=set)  # what bias="all" saves of a head twice over


def read_peft(model: nn.Module, folder: Path, name: str) -> tuple[Graft, Adapter]:
    """The adapter of a peft LoRA folder, ready to be installed.

    Raises:
        CheckpointError: A setting that we do not know, or tensors that do not fit the model.
    """
    foreign = _open(folder)
    modules = base_modules(model)
    lacking = [p for p in foreign.pairs if p not in modules]
    lacking += [n for n in foreign.whole if n.rpartition(".")[0] not in modules]
    if lacking:
        raise CheckpointError(
            f"{foreign.file.path} was made for another model: this {type(model).__name__} has no "
            + ", ".join(sorted(lacking)[:3])
        )
    _drop_unchanged(foreign, modules)
    heads, bias = _whole_parts(foreign, folder)
    recipe = _recipe(sites(model), foreign, bias)
    graft, adapter = prepare(
        model, recipe, name, head=heads or False, dtype=torch.float32, fresh=False
    )
    _fill(adapter, foreign)
    return graft, adapter


def _open(folder: Path) -> Foreign:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG} is no valid JSON object")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{folder} holds a peft adapter of type {config.get('peft_type')!r}; LORA can be read"
        )
    unknown = sorted(key for key, value in config.items() if key not in KNOWN and value)
    if unknown:
        raise CheckpointError(
            f"{folder / CONFIG} uses {', '.join(unknown)}, which Espalier cannot reproduce yet"
        )
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_INITS:
        raise CheckpointError(
            f"{folder / CONFIG}: init_lora_weights={start!r} rewrites the base's weights; convert "
            "the adapter to a plain LoRA with peft first (path_initial_model_for_weight_conversion)"
        )
    path = folder / WEIGHTS
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        path = folder / "adapter_model.bin"  # refused by name
    foreign = Foreign(config, container.open_file(path))
    for key in foreign.file.entries:
        _sort_key(foreign, key)
    return foreign


def _sort_key(foreign: Foreign, key: str) -> None:
    inner = key.removeprefix(PREFIX)
    for word, part in (
        (".lora_A.weight", "a"), (".lora_B.weight", "b"),
        (".lora_embedding_A", "a"), (".lora_embedding_B", "b"),
    ):  # fmt: skip
        if inner.endswith(word):
            foreign.pairs.setdefault(inner.removesuffix(word), {})[part] = key
            return
    name = inner.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
    if ".original_module." in inner or name in foreign.whole:
        foreign.spare.add(key)
        return
    if ".lora_" in inner or not key.startswith(PREFIX):
        raise CheckpointError(f"{foreign.file.path}: cannot place the tensor {key!r}")
    foreign.whole[name] = key


def _drop_unchanged(foreign: Foreign, modules: Mapping[str, nn.Module]) -> None:
    """Set aside copies of the base's own tables, which peft saves beside adapted embeddings."""
    for name, key in list(foreign.whole.items()):
        path, _, last = name.rpartition(".")
        own = modules[path]._parameters.get(last)
        if last == "weight" and own is not None and own.shape == foreign.file.entries[key].shape:
            value = foreign.file.tensor(key)
            if torch.equal(value.to(own.dtype), own.detach().cpu()):
                del foreign.whole[name]
                foreign.spare.add(key)


def _whole_parts(foreign: Foreign, folder: Path) -> tuple[list[str], str]:
    """(modules saved whole, which biases train)."""
    bias = foreign.config.get("bias") or "none"
    wanted = foreign.config.get("modules_to_save") or []
    heads: list[str] = []
    for name in foreign.whole:
        path, _, key = name.rpartition(".")
        if any(path == w or path.endswith("." + w) or f".{w}." in f".{path}." for w in wanted):
            heads.append(path)
        elif key != "bias" or bias == "none":
            raise CheckpointError(
                f"{folder}: {name} is saved, but neither modules_to_save nor bias speaks of it"
            )
    return list(dict.fromkeys(heads)), bias


def _recipe(places: Sites, foreign: Foreign, bias: str) -> Recipe:
    """One LoRA for each (rank, alpha) that occurs, with a selector that names its layers."""
    config, kinds = foreign.config, {}
    for path, keys in foreign.pairs.items():
        if set(keys) != {"a", "b"}:
            raise CheckpointError(f"{foreign.file.path}: {path} has only one of its two matrices")
        rank = foreign.file.entries[keys["a"]].shape[0]
        kinds.setdefault((rank, _pattern(config, "alpha_pattern", path, "lora_alpha")), []).append(
            path
        )
    return Recipe(
        tuple(
            LoRA(
                rank=rank,
                alpha=alpha,
                dropout=config.get("lora_dropout") or 0.0,
                rslora=bool(config.get("use_rslora")),
                # All biases belong to the first; those of adapted layers to each its own.
                bias=bias if index == 0 or bias == "lora_only" else "none",
                sites=_selector(places, paths),
            )
            for index, ((rank, alpha), paths) in enumerate(kinds.items())
        )
    )


def _pattern(config: Mapping[str, Any], pattern: str, path: str, default: str) -> float:
    """Peft's value for a path: its pattern's whose key ends the path, else the default."""
    for key, value in (config.get(pattern) or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", path):
            return float(value)
    return float(config.get(default) or 8)


def _selector(places: Sites, paths: list[str]) -> str:
    """The shortest selector for exactly these hosts: roles, else last names, else all paths."""
    wanted = set(paths)
    roles = {site.role for site in places if site.path in wanted and not (site.rows or site.span)}
    last = {"*." + path.rpartition(".")[2] for path in paths}
    for short in ("all-linear", ", ".join(sorted(roles)), ", ".join(sorted(last))):
        try:
            if {site.path for site in places.select(short)} == wanted:
                return short
        except SiteError:
            continue
    return ", ".join(paths)


def _fill(adapter: Adapter, foreign: Foreign) -> None:
    """Copy the file's tensors into the adapter; every one must have its place."""
    used: set[str] = set()
    for delta in adapter.deltas:
        site: Site = delta.site
        for key, view in delta.t.items():
            source = (
                foreign.whole.get(f"{site.path}.{key}")
                if delta.replaces
                else foreign.pairs[site.path][key]
            )
            if source is None:
                raise CheckpointError(f"{foreign.file.path} lacks {site.path}.{key}")
            value = foreign.file.tensor(source)
            if value.shape != view.shape:
                raise CheckpointError(
                    f"{foreign.file.path}: {source} has shape {tuple(value.shape)}, this model "
                    f"needs {tuple(view.shape)}"
                )
            view.data.copy_(value)
            used.add(source)
    unplaced = sorted(set(foreign.file.entries) - used - foreign.spare)
    if unplaced:
        raise CheckpointError(f"{foreign.file.path}: no place for {', '.join(unplaced[:3])}")
