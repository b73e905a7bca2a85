"""What peft saves beside the changes themselves: task heads, other whole modules, biases."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from espalier.adapter import Adapter
from espalier.deltas import Delta, Tensors
from espalier.errors import CheckpointError
from espalier.interop.foreign import Foreign, refuse_strangers
from espalier.interop.peft.files import HEADS, PREFIX, task_of
from espalier.modules import base_modules


def numbers(delta: Delta) -> Tensors:
    """What serves a delta's change: its numbers without those that only training needed."""
    with torch.no_grad():
        return delta.plain({key: view.detach() for key, view in delta.t.items()})


def whole_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The trained copies of an adapter by the parameter that each stands in for."""
    return {
        f"{delta.site.path}.{name}": view.detach()
        for delta in adapter.deltas
        if delta.replaces
        for name, view in delta.t.items()
    }


def head_tensors(adapter: Adapter, what: str) -> dict[str, Tensor]:
    """The trained copies of a task head, by parameter.

    Raises:
        CheckpointError: The adapter replaces something else too, which `what` has no place for.
    """
    found = whole_tensors(adapter)
    other = next((name for name in found if name.rpartition(".")[0] not in adapter.head), None)
    if other is not None:
        raise CheckpointError(
            f"peft's {what} format keeps {what} and heads; this adapter replaces {other}. Save it "
            "in Espalier's own format"
        )
    return found


def saved_whole(model: nn.Module, head: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that peft saves whole beside an adapter with this head, the outermost of them.

    They are those whose paths end in a name of the head's, or in one that it adds for the task.
    """
    ends = (*HEADS.get(task_of(model) or "", ()), *head)
    found: dict[str, nn.Module] = {}
    for path, module in base_modules(model).items():
        if path.endswith(ends) and not any(path.startswith(outer + ".") for outer in found):
            found[path] = module
    return found


def saved_key(name: str, adapted: Container[str]) -> str:
    """Peft's key for a whole parameter; a bias of an adapted layer lies in its base layer."""
    path, _, key = name.rpartition(".")
    return PREFIX + (f"{path}.base_layer.{key}" if path in adapted else name)


@dataclass(slots=True)
class Whole:
    """Whole parameters of a folder, by name, with their keys in the file."""

    foreign: Foreign
    prefix: str = PREFIX
    keys: dict[str, str] = field(default_factory=dict)

    def add(self, key: str) -> None:
        """Sort a key that belongs to no change; a head that is saved twice counts once."""
        inner = key.removeprefix(self.prefix)
        name = inner.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if ".original_module." in inner or name in self.keys:
            self.foreign.spare.add(key)
        elif not key.startswith(self.prefix):
            raise CheckpointError(f"{self.foreign.file.path}: cannot place the tensor {key!r}")
        else:
            self.keys[name] = key

    def refuse_strangers(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        """Raise CheckpointError where the model lacks a module that was saved."""
        names = {name.rpartition(".")[0] for name in self.keys}
        refuse_strangers(self.foreign, model, modules, names)

    def drop_unchanged(self, modules: Mapping[str, nn.Module]) -> None:
        """Set aside copies of the base's own tables, which peft saves beside adapted embeddings.

        Modules that the settings ask for stay.
        """
        file = self.foreign.file
        for name, key in list(self.keys.items()):
            path, _, last = name.rpartition(".")
            own = modules[path]._parameters.get(last)
            if last != "weight" or own is None or own.shape != file.entries[key].shape:
                continue
            if self._asked_for(path):
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
        found: list[str] = []
        for name in self.keys:
            path, _, key = name.rpartition(".")
            if self._asked_for(path):
                found.append(path)
            elif key != "bias" or (config.get("bias") or "none") == "none":
                raise CheckpointError(
                    f"{self.foreign.folder}: {name} is saved, but neither modules_to_save nor "
                    "bias speaks of it"
                )
        return list(dict.fromkeys(found))

    def _asked_for(self, path: str) -> bool:
        wanted = self.foreign.config.get("modules_to_save") or []
        return any(f"{end}." in f"{path}." for end in wanted)

    def value(self, name: str) -> Tensor | None:
        """A whole parameter's value, or None where the file lacks it."""
        return self.foreign.take(self.keys[name]) if name in self.keys else None
