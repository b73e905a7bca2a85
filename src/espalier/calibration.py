"""Showing an adapter examples before it trains, for methods that choose what to train by data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from espalier import hosts
from espalier.errors import AdapterError, SettingError
from espalier.graft import find, get
from espalier.modules import base_modules, is_sharded
from espalier.verbs import activate, active

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


def calibrate(
    model: nn.Module, name: str, batches: Iterable[Mapping[str, Any]], loss: Loss | None = None
) -> None:
    """Let an adapter choose what it trains by the gradients of the base on a few batches.

    It is given E[(∂loss/∂θ)²], the empirical Fisher information, of every parameter that it may
    change: the mean over batches, so that batches of one example give the paper's. The base runs
    in evaluation mode with the other active adapters, and keeps its bits.

    Args:
        model: A model with the adapter, which has not trained yet.
        name: The adapter.
        batches: Keywords of the model, labels included, on its device.
        loss: (model, batch) → the loss; by default `model(**batch).loss`.

    Raises:
        AdapterError: No such adapter, it has nothing to choose, or has trained already.
        SettingError: There is no batch, or the model gives no loss.
    """
    graft, adapter = find(model), get(model, name)
    graft.refuse_merged()
    if is_sharded(model):
        raise SettingError(
            f"{adapter.recipe} chooses by gradients of the base's own weights, which are spread "
            "over processes here: choose on one process, save the adapter, and load it to train"
        )
    asking = [delta for delta in adapter.deltas if delta.measures]
    if not asking:
        raise AdapterError(f"adapter {name!r} has nothing to choose by data: {adapter.recipe}")
    modules = base_modules(model)
    wanted = {
        delta: {
            key: hosts.parameter(modules[at], name) for key, (at, name) in delta.measured.items()
        }
        for delta in asking
    }
    unique = {id(p): p for own in wanted.values() for p in own.values()}
    with _bare(model, name, unique.values()):
        squares = _mean_squares(model, list(unique.values()), batches, loss or _own_loss)
    by_id = dict(zip(unique, squares, strict=True))
    with torch.no_grad():
        for delta, own in wanted.items():
            delta.calibrate({key: by_id[id(p)] for key, p in own.items()})
    graft.refresh()


@contextmanager
def _bare(model: nn.Module, name: str, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """The model in evaluation mode without the adapter, with gradients for base parameters."""
    before, modes = active(model), [(m, m.training) for m in model.modules()]
    activate(model, {other: weight for other, weight in before.items() if other != name})
    model.eval()
    held = list(parameters)
    try:
        for parameter in held:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(False)
        for module, mode in modes:
            module.training = mode
        activate(model, before)


def _mean_squares(
    model: nn.Module,
    parameters: list[nn.Parameter],
    batches: Iterable[Mapping[str, Any]],
    loss: Loss,
) -> list[Tensor]:
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    count = 0
    for batch in batches:
        grads = torch.autograd.grad(loss(model, batch), parameters, allow_unused=True)
        for total, grad in zip(sums, grads, strict=True):
            if grad is not None:
                total.addcmul_(grad.float(), grad.float())
        count += 1
    if not count:
        raise SettingError("calibrate needs at least one batch of training data")
    return [total / count for total in sums]


def _own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    found = getattr(model(**batch), "loss", None)
    if found is None:
        raise SettingError(
            "the model gives no loss for these batches: put labels in, or pass loss=, a function "
            "of the model and a batch"
        )
    return found
