"""A file that another library wrote, and filling an adapter from it without leaving any out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.adapter import Adapter
from espalier.container import Container
from espalier.deltas import Delta
from espalier.errors import CheckpointError


@dataclass(slots=True)
class Foreign:
    """An opened file with its settings; `spare` are tensors that need no place."""

    folder: Path
    config: dict[str, Any]
    file: Container
    used: set[str] = field(default_factory=set)
    spare: set[str] = field(default_factory=set)

    def take(self, key: str) -> Tensor:
        """A tensor of the file, counted as used."""
        self.used.add(key)
        return self.file.tensor(key)


def fill(adapter: Adapter, foreign: Foreign, give: Callable[[Delta, str], Tensor | None]) -> None:
    """Copy the file's tensors into the adapter; every one must have its place.

    Args:
        adapter: Built from the folder's settings, its numbers still zero.
        foreign: The file.
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


def refuse_strangers(
    foreign: Foreign, model: nn.Module, modules: Mapping[str, nn.Module], paths: set[str]
) -> None:
    """Raise CheckpointError where the model lacks a module that the file changes."""
    lacking = sorted(path for path in paths if path not in modules)
    if lacking:
        raise CheckpointError(
            f"{foreign.file.path} was made for another model: this {type(model).__name__} has no "
            + ", ".join(lacking[:3])
        )


def refuse_unknown(config: Mapping[str, Any], known: set[str], where: Path) -> None:
    """Raise CheckpointError for settings that we cannot reproduce."""
    unknown = sorted(key for key, value in config.items() if key not in known and value)
    if unknown:
        raise CheckpointError(
            f"{where} uses {', '.join(unknown)}, which Espalier cannot reproduce yet"
        )
