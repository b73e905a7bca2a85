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


def backbone(model: nn.Module) -> str:
    """The path of a task model's backbone; "" where the model is one itself."""
    model = unwrap(model)
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix and prefix in model._modules else ""


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base by path; what Espalier put beside them is left out."""
    return {
        path: module
        for path, module in unwrap(model).named_modules()
        if path.partition(".")[0] != CHILD
    }
