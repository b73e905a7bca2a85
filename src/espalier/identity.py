"""Which base an adapter belongs to: its name, its class, and a few of its values.

Names lie (a folder is moved, a hub entry is updated), so a handful of numbers is kept as well and
compared when the adapter is loaded: another checkpoint of the same shape is noticed at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from espalier.errors import CheckpointError
from espalier.hosts import whole
from espalier.modules import base_modules, plain_type
from espalier.places import CHILD
from espalier.storage import stored

TENSORS, VALUES = 8, 4
_NOTED: WeakKeyDictionary[nn.Module, dict[str, list[float]]] = WeakKeyDictionary()
_SLACK = 0.02  # a base in bf16 instead of fp32 differs by 0.4 %


def of(model: nn.Module, without: Sequence[str] = ()) -> dict[str, Any]:
    """The base's identity as JSON data; modules in `without` (a new head) are left out."""
    named = [(name, p) for name, p in _telling(model) if name.rpartition(".")[0] not in without]
    step = max(1, len(named) // TENSORS)
    config, storage = getattr(model, "config", None), stored(model)
    return {
        "name": str(getattr(config, "_name_or_path", "") or ""),
        "class": plain_type(model).__name__,
        "values": {name: _values(model, name, p) for name, p in named[::step][:TENSORS]},
        **({} if storage is None else {"quantised": storage.to_json()}),
    }


def digest(model: nn.Module, modules: Iterable[str]) -> str:
    """A hash of the values (up to 256 of each parameter) that these modules own, by path."""
    found = hashlib.sha256()
    for path in modules:
        for name, p in model.get_submodule(path)._parameters.items():
            if p is None:
                continue
            flat = p.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // 256)].cpu().contiguous()
            found.update(f"{path}.{name} {tuple(p.shape)} {p.dtype}".encode())
            found.update(some.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def note(model: nn.Module) -> None:
    """Keep the values that tell a base from others, before it is spread over processes.

    So one process alone can save an adapter or check one that it loads.
    """
    _NOTED[model] = {name: _sample(p) for name, p in _telling(model)}


def _values(model: nn.Module, name: str, parameter: Tensor) -> list[float]:
    return _NOTED.get(model, {}).get(name) or _sample(parameter)


def _telling(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [
        (name, p)
        for name, p in model.named_parameters()
        if not name.startswith(f"{CHILD}.") and p.is_floating_point() and p.numel() >= VALUES
    ]


def _sample(parameter: Tensor) -> list[float]:
    flat = whole(parameter.detach()).view(-1)
    values = flat[_spread(flat.numel()).to(flat.device)].float().tolist()
    return [float(f"{value:.6g}") for value in values]


@lru_cache(maxsize=64)
def _spread(count: int) -> Tensor:
    """Which of so many values are looked at."""
    with _disable_current_modes():  # it is kept: no fake numbers
        return torch.linspace(0, count - 1, VALUES, device="cpu").long()


def check(model: nn.Module, base: Mapping[str, Any], file: Path) -> None:
    """Raise CheckpointError where the model's values are not those that were noted.

    Parameters that this model stores otherwise (4-bit, another head) are passed over.
    """
    modules = base_modules(model)
    for name, values in base["values"].items():
        path, _, leaf = name.rpartition(".")
        parameter = modules[path]._parameters.get(leaf) if path in modules else None
        if parameter is None or not parameter.is_floating_point() or parameter.numel() < VALUES:
            continue
        here = _values(model, name, parameter)
        slack = _SLACK * max(map(abs, values)) + 1e-6
        if any(abs(a - b) > slack for a, b in zip(here, values, strict=True)):
            raise CheckpointError(
                f"{file} was trained on another base: {base['name'] or base['class']} has "
                f"{name} ≈ {values}, this model {here}. Load that base, or pass check_base=False "
                "if you know that they are meant to differ"
            )
