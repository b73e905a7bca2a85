"""The two files of a peft folder, and what all of peft's types have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from espalier import container
from espalier.adapter import Adapter
from espalier.errors import CheckpointError
from espalier.graft import Graft
from espalier.interop.foreign import Foreign, refuse_unknown

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PROMPT_PREFIX = "base_model."  # of kinds that leave the model's layers as they are
# The last part of a transformers class name says what peft calls the task.
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# What peft trains and saves beside every adapter of a task: modules, by the end of their path.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# Settings of every type that say nothing about how saved numbers act.
COMMON = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "modules_to_save", "peft_type",
    "peft_version", "revision", "task_type",
}  # fmt: skip


class Kind(NamedTuple):
    """One of peft's types.

    Attributes:
        known: Its settings that we act upon, or that say nothing about how saved numbers act.
        fits: Whether an adapter has this form.
        write: (model, adapter) → its settings, and its tensors by peft's keys.
        read: (model, opened folder, name) → the adapter and the graft to install it with.
        prefix: What its keys put before a module's path.
    """

    known: set[str]
    fits: Callable[[Adapter], bool]
    write: Callable[[nn.Module, Adapter], tuple[dict[str, Any], dict[str, Tensor]]]
    read: Callable[[nn.Module, Foreign, str], tuple[Graft, Adapter]]
    prefix: str = PREFIX


def task_of(model: nn.Module) -> str | None:
    """What peft calls the task of a model's class; None where it has no word for it."""
    name = type(model).__name__
    return next((task for end, task in TASKS.items() if name.endswith(end)), None)


def write_folder(
    model: nn.Module, folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write settings and tensors; adds the settings that every type has."""
    base = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "") or None
    common = {
        "base_model_name_or_path": base,
        "inference_mode": True,
        "task_type": task_of(model),
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
    refuse_unknown(config, COMMON | kind.known, folder / CONFIG)
    path = folder / WEIGHTS
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        path = folder / "adapter_model.bin"  # refused by name
    return Foreign(folder, config, container.open_file(path))
