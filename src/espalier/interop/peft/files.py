"""The two files of a peft folder, and what all of peft's types have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from espalier import container
from espalier.adapter import Adapter
from espalier.container import Container
from espalier.deltas import Delta
from espalier.errors import CheckpointError
from espalier.graft import Graft

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
# Settings of every type that say nothing about how saved numbers act.
COMMON = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "modules_to_save", "peft_type",
    "peft_version", "revision", "task_type",
}  # fmt: skip


@dataclass(slots=True)
class Foreign:
    """A peft folder that was opened; `spare` are tensors that need no place."""

    folder: Path
    config: dict[str, Any]
    file: Container
    used: set[str] = field(default_factory=set)
    spare: set[str] = field(default_factory=set)

    def take(self, key: str) -> Tensor:
        """A tensor of the file, counted as used."""
        self.used.add(key)
        return self.file.tensor(key)


class Kind(NamedTuple):
    """One of peft's types.

    Attributes:
        known: Its settings that we act upon, or that say nothing about how saved numbers act.
        fits: Whether an adapter has this form.
        write: (model, adapter) → its settings, and its tensors by peft's keys.
        read: (model, opened folder, name) → the adapter and the graft to install it with.
    """

    known: set[str]
    fits: Callable[[Adapter], bool]
    write: Callable[[nn.Module, Adapter], tuple[dict[str, Any], dict[str, Tensor]]]
    read: Callable[[nn.Module, Foreign, str], tuple[Graft, Adapter]]


def write_folder(
    model: nn.Module, folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write settings and tensors; adds the settings that every type has."""
    base = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "") or None
    name = type(model).__name__
    common = {
        "base_model_name_or_path": base,
        "inference_mode": True,
        "task_type": next((task for end, task in TASKS.items() if name.endswith(end)), None),
    }
    ordered = {key: tensors[key].detach().contiguous() for key in sorted(tensors)}
    container.write(folder / WEIGHTS, ordered.items(), ordered.values(), {"format": "pt"})
    text = json.dumps({**common, **config}, indent=2, sort_keys=True) + "\n"
    container.write_text(folder / CONFIG, text)


def open_folder(folder: Path, kinds: Mapping[str, Kind]) -> Foreign:
    """Read a folder's settings and its tensors' names.

    Raises:
        CheckpointError: It is damaged, or has a type or a setting that is not known.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG} is no valid JSON object")
    kind = kinds.get(str(config.get("peft_type")))
    if kind is None:
        raise CheckpointError(
            f"{folder} holds a peft adapter of type {config.get('peft_type')!r}; "
            f"{', '.join(kinds)} can be read"
        )
    known = COMMON | kind.known
    unknown = sorted(key for key, value in config.items() if key not in known and value)
    if unknown:
        raise CheckpointError(
            f"{folder / CONFIG} uses {', '.join(unknown)}, which Espalier cannot reproduce yet"
        )
    path = folder / WEIGHTS
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        path = folder / "adapter_model.bin"  # refused by name
    return Foreign(folder, config, container.open_file(path))


def fill(adapter: Adapter, foreign: Foreign, give: Callable[[Delta, str], Tensor | None]) -> None:
    """Copy the file's tensors into the adapter; every one must have its place.

    Args:
        adapter: Built from the folder's settings, its numbers still zero.
        foreign: The folder.
        give: (delta, name of its number) → the value from the file, or None where it lacks it.
    """
    path = foreign.file.path
    with torch.no_grad():
        for delta in adapter.deltas:
            for key, view in delta.t.items():
                value = give(delta, key)
                if value is None:
                    raise CheckpointError(f"{path} lacks {delta.site.path}.{key}")
                if value.shape != view.shape:
                    raise CheckpointError(
                        f"{path}: {delta.site.path}.{key} has shape {tuple(value.shape)}, this "
                        f"model needs {tuple(view.shape)}"
                    )
                view.data.copy_(value)
    unplaced = sorted(set(foreign.file.entries) - foreign.used - foreign.spare)
    if unplaced:
        raise CheckpointError(f"{path}: no place for {', '.join(unplaced[:3])}")
