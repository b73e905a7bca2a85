"""The base's modules, whatever was put around the model or beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
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


_WALKED: ContextVar[tuple[nn.Module, dict[str, nn.Module]] | None] = ContextVar(
    "walked", default=None
)


@contextmanager
def one_walk(model: nn.Module) -> Iterator[None]:
    """Within it `base_modules` of this model are looked for once; none may come or go."""
    model = unwrap(model)
    token = _WALKED.set((model, base_modules(model)))
    try:
        yield
    finally:
        _WALKED.reset(token)


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base by path, to be read; what Espalier put beside them is left out."""
    model = unwrap(model)
    walked = _WALKED.get()
    if walked is not None and walked[0] is model:
        return walked[1]
    found = {"": model}
    seen = {id(model)}
    for name, child in model._modules.items():
        if child is not None and name != CHILD and id(child) not in seen:
            _walk(child, name, found, seen)
    return found


def _walk(module: nn.Module, path: str, found: dict[str, nn.Module], seen: set[int]) -> None:
    """As `named_modules` goes, in a fraction of its time."""
    found[path] = module
    seen.add(id(module))
    if children := module._modules:
        path += "."
        for name, child in children.items():
            if child is not None and id(child) not in seen:
                _walk(child, path + name, found, seen)
