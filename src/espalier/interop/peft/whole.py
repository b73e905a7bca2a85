"""What peft saves beside the changes themselves: task heads, other whole modules, biases."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from espalier.adapter import Adapter
from espalier.errors import CheckpointError
from espalier.interop.foreign import Foreign, refuse_strangers
from espalier.interop.peft.files import PREFIX


def whole_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The trained copies of an adapter by the parameter that each stands in for."""
    return {
        f"{delta.site.path}.{name}": view.detach()
        for delta in adapter.deltas
        if delta.replaces
        for name, view in delta.t.items()
    }


def saved_key(name: str, adapted: Container[str]) -> str:
    """Peft's key for a whole parameter; a bias of an adapted layer lies in its base layer."""
    path, _, key = name.rpartition(".")
    return PREFIX + (f"{path}.base_layer.{key}" if path in adapted else name)


@dataclass(slots=True)
class Whole:
    """Whole parameters of a folder, by name, with their keys in the file."""

    foreign: Foreign
    keys: dict[str, str] = field(default_factory=dict)

    def add(self, key: str) -> None:
        """Sort a key that belongs to no change; a head that is saved twice counts once."""
        inner = key.removeprefix(PREFIX)
        name = inner.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if ".original_module." in inner or name in self.keys:
            self.foreign.spare.add(key)
        elif not key.startswith(PREFIX):
            raise CheckpointError(f"{self.foreign.file.path}: cannot place the tensor {key!r}")
        else:
            self.keys[name] = key

    def refuse_strangers(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        """Raise CheckpointError where the model lacks a module that was saved."""
        names = {name.rpartition(".")[0] for name in self.keys}
        refuse_strangers(self.foreign, model, modules, names)

    def drop_unchanged(self, modules: Mapping[str, nn.Module]) -> None:
        """Set aside copies of the base's own tables, which peft saves beside adapted embeddings."""
        file = self.foreign.file
        for name, key in list(self.keys.items()):
            path, _, last = name.rpartition(".")
            own = modules[path]._parameters.get(last)
            if last != "weight" or own is None or own.shape != file.entries[key].shape:
                continue
            if torch.equal(file.tensor(key).to(own.dtype), own.detach().cpu()):
                del self.keys[name]
                self.foreign.spare.add(key)

    def heads(self) -> list[str]:
        """The modules that were saved whole, biases that train beside a change left out.

        Raises:
            CheckpointError: Something is saved of which the settings do not speak.
        """
        config = self.foreign.config
        wanted = config.get("modules_to_save") or []
        found: list[str] = []
        for name in self.keys:
            path, _, key = name.rpartition(".")
            if any(path == w or path.endswith("." + w) or f".{w}." in f".{path}." for w in wanted):
                found.append(path)
            elif key != "bias" or (config.get("bias") or "none") == "none":
                raise CheckpointError(
                    f"{self.foreign.folder}: {name} is saved, but neither modules_to_save nor "
                    "bias speaks of it"
                )
        return list(dict.fromkeys(found))

    def value(self, name: str) -> Tensor | None:
        """A whole parameter's value, or None where the file lacks it."""
        return self.foreign.take(self.keys[name]) if name in self.keys else None
