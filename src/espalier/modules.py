"""The base's modules, whatever was put around the model or beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.places import CHILD

if TYPE_CHECKING:
    from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside what `torch.compile` or data parallelism put around it."""
    while True:
        if "_orig_mod" in model._modules:
            inner = model._modules["_orig_mod"]
        elif type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model._modules["module"]
        else:
            return model
        assert inner is not None
        model = inner


def plain_type(model: nn.Module) -> type:
    """The model's own class, also where FSDP2 has put a class of its own over it."""
    kinds = type(model).__mro__
    names = [kind.__name__ for kind in kinds]
    return kinds[names.index("FSDPModule") + 1 if "FSDPModule" in names else 0]


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2, or DeepSpeed's ZeRO-3, has spread this model over processes."""
    model = unwrap(model)
    if any(kind.__name__ == "FSDPModule" for kind in type(model).__mro__):
        return True
    return hasattr(next(model.parameters(), None), "ds_id")


def backbone(model: nn.Module) -> str:
    """The path of a task model's backbone; "" where the model is one itself."""
    model = unwrap(model)
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix and prefix in model._modules else ""


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base by path; what Espalier put beside them is left out."""
    found: dict[str, nn.Module] = {}
    _walk(unwrap(model), "", found, set())
    return found


def _walk(module: nn.Module, path: str, found: dict[str, nn.Module], seen: set[int]) -> None:
    """As `named_modules` goes, in a third of its time, and not into what we put at the root."""
    found[path] = module
    seen.add(id(module))
    for name, child in module._modules.items():
        if child is not None and id(child) not in seen and (path or name != CHILD):
            _walk(child, f"{path}.{name}" if path else name, found, seen)
