"""LoRA files of diffusers, both ways: pytorch_lora_weights.safetensors.

Keys are `<component>.<path>.lora_A.weight` and so on, the component being "unet" or "transformer".
Written: low-rank changes (PiSSA and LoRA-FA in their plain form, DoRA with its magnitudes), the
scale within B, so that alpha is the rank also for readers that know of no alpha. Read: the same,
the older `lora.down`, `lora.up` and `alpha` keys, and the settings in the file's header.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier import container
from espalier.adapter import Adapter
from espalier.container import Container
from espalier.deltas import Delta
from espalier.errors import CheckpointError
from espalier.graft import Graft
from espalier.interop.foreign import Foreign, fill, refuse_strangers, refuse_unknown
from espalier.interop.lows import by_host, is_dora, is_low, joined, loras, magnitudes, stretched
from espalier.interop.peft.files import COMMON
from espalier.interop.peft.lora import KNOWN, refuse_rewritten
from espalier.interop.targets import pattern
from espalier.modules import base_modules
from espalier.places import sites
from espalier.verbs import prepare

WEIGHTS = "pytorch_lora_weights.safetensors"
HEADER = "lora_adapter_metadata"
# What a denoiser's class is called, and what pipelines call the component.
COMPONENTS = {"UNet": "unet", "Transformer": "transformer"}
_WORDS = {
    ".lora_A.weight": "a", ".lora_B.weight": "b", ".lora.down.weight": "a", ".lora.up.weight": "b",
    ".lora_magnitude_vector": "m", ".lora_magnitude_vector.weight": "m", ".alpha": "alpha",
}  # fmt: skip


def write_diffusers(model: nn.Module, adapter: Adapter, folder: Path) -> None:
    """Write an adapter as a folder that a pipeline's `load_lora_weights` takes.

    Raises:
        CheckpointError: diffusers has no form for it, or the folder cannot be written.
    """
    component = _component(model)
    deltas = by_host(adapter)
    lows = {path: joined(here) for path, here in deltas.items()} if is_low(adapter) else {}
    if len(deltas) == 0 or len(lows) < len(deltas) or any(d.replaces for d in adapter.deltas):
        raise CheckpointError(
            f"diffusers' format keeps low-rank changes of layers only, which {adapter.recipe} is "
            "not. Save it in Espalier's own format, or merge it where it can be merged"
        )
    modules = base_modules(model)
    tensors: dict[str, Tensor] = {}
    for path, low in lows.items():
        start = f"{component}.{path}"
        tensors[f"{start}.lora_A.weight"] = low.a
        tensors[f"{start}.lora_B.weight"] = low.b * low.scale
        if is_dora(adapter):
            tensors[f"{start}.lora_magnitude_vector"] = magnitudes(modules[path], deltas[path], low)
    ranks = {path: low.rank for path, low in lows.items()}
    usual = statistics.mode(ranks.values())
    others = {f"^{path}": rank for path, rank in ranks.items() if rank != usual}
    settings = {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(lows),
        "use_dora": is_dora(adapter),
    }
    header = json.dumps({f"{component}.{key}": value for key, value in settings.items()})
    ordered = {key: tensors[key].contiguous() for key in sorted(tensors)}
    metadata = {"format": "pt", HEADER: header}
    container.write(folder / WEIGHTS, ordered.items(), ordered.values(), metadata)


def weights_in(path: Path) -> Path | None:
    """The file of diffusers' that a path means, a folder with one or the file itself; else None."""
    if path.is_dir():
        return path / WEIGHTS if (path / WEIGHTS).is_file() else None
    if path.suffix != ".safetensors":
        return None
    opened = container.open_file(path)
    theirs = "espalier" not in opened.metadata and any("lora" in key for key in opened.entries)
    return path if theirs else None


def read_diffusers(model: nn.Module, file: Path, name: str) -> tuple[Graft, Adapter]:
    """The model's part of a LoRA file of diffusers', ready to be installed.

    Raises:
        CheckpointError: The file holds none for this component, or something that is not known.
    """
    component = _component(model)
    opened = container.open_file(file)
    foreign = Foreign(file.parent, _settings(opened, component), opened)
    layers = _sorted(foreign, component)
    modules = base_modules(model)
    refuse_strangers(foreign, model, modules, set(layers))
    kinds = {path: _kind(foreign, path, keys) for path, keys in layers.items()}
    dora = {"m" in keys for keys in layers.values()}
    if len(dora) > 1:
        raise CheckpointError(f"{file}: some layers have magnitudes (DoRA), others have none")
    rslora = bool(foreign.config.get("use_rslora"))
    recipe = loras(sites(model), kinds, dora=dora.pop(), rslora=rslora)
    graft, adapter = prepare(model, recipe, name, head=False, dtype=torch.float32, fresh=False)

    def give(delta: Delta, key: str) -> Tensor | None:
        path = delta.site.path
        value = foreign.take(layers[path][key])
        return stretched(value, modules[path], delta.site) if key == "m" else value

    fill(adapter, foreign, give)
    return graft, adapter


def _component(model: nn.Module) -> str:
    """What a pipeline calls this model."""
    cls = type(model)
    if cls.__module__.partition(".")[0] == "diffusers":
        for word, component in COMPONENTS.items():
            if word in cls.__name__:
                return component
    raise CheckpointError(
        f"diffusers' LoRA files are for a pipeline's UNet or transformer, not for {cls.__name__}; "
        "use the format 'peft' for it"
    )


def _settings(opened: Container, component: str) -> dict[str, Any]:
    """The component's settings in the file's header; none in files of older versions."""
    try:
        held = json.loads(opened.metadata.get(HEADER, "{}"))
    except ValueError:
        raise CheckpointError(f"{opened.path}: the settings in its header are damaged") from None
    start = f"{component}."
    config = {k.removeprefix(start): v for k, v in held.items() if k.startswith(start)}
    refuse_unknown(config, KNOWN | COMMON, opened.path)
    refuse_rewritten(config, opened.path)
    return config


def _sorted(foreign: Foreign, component: str) -> dict[str, dict[str, str]]:
    """Keys of each layer's numbers by path; other components' are set aside."""
    found: dict[str, dict[str, str]] = {}
    path = foreign.file.path
    for key in foreign.file.entries:
        start, _, inner = key.partition(".")
        if start != component:
            foreign.spare.add(key)
            continue
        word = next((word for word in _WORDS if inner.endswith(word)), None)
        if word is None:
            raise CheckpointError(
                f"{path}: cannot place the tensor {key!r}; load the file into a pipeline of "
                "diffusers and write it anew with save_lora_weights"
            )
        found.setdefault(inner.removesuffix(word), {})[_WORDS[word]] = key
    if not found:
        held = ", ".join(sorted({key.partition(".")[0] for key in foreign.file.entries})[:4])
        raise CheckpointError(
            f"{path} holds no LoRA for a {component}, only {held}. Files of other trainers "
            "(lora_unet_…) become diffusers' with load_lora_weights and save_lora_weights there"
        )
    return found


def _kind(foreign: Foreign, path: str, keys: dict[str, str]) -> tuple[int, float]:
    """Rank and alpha of a layer: as its own tensor says, or the header, or else the rank."""
    if not {"a", "b"} <= set(keys):
        raise CheckpointError(f"{foreign.file.path}: {path} has only one of its two matrices")
    rank = foreign.file.entries[keys["a"]].shape[0]
    if "alpha" in keys:
        return rank, float(foreign.take(keys["alpha"]))
    if "lora_alpha" in foreign.config:
        return rank, pattern(foreign.config, "alpha_pattern", path, "lora_alpha")
    return rank, float(rank)
