"""Gradients of a function, and what is kept for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def graded(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients for a fixed gradient of the output."""
    fresh = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    out = function(*fresh)
    back = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    return [out, *torch.autograd.grad(out, [x for x in fresh if x.requires_grad], back)]


def equal(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-9) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def numbers(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


def saved_bytes(model: nn.Module, batch: dict[str, Any]) -> int:
    """What a forward pass keeps for backward, each storage once; no parameters, no batch."""
    known = [*model.parameters(), *model.buffers(), *batch.values()]
    own = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, Tensor] = {}  # alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        at = tensor.untyped_storage().data_ptr()
        if at not in own:
            kept[at] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert model(**batch).loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
