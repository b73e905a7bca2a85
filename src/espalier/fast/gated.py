"""The product in a gated feed-forward, act(g) ⊙ u, which keeps g and u and nothing else.

A feed-forward is taken over when its own forward, tried with small weights, computes
`out(act(gate(x)) * up(x))` with an activation that is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from espalier.fast.made import note

_ops = torch.ops.aten


class Act(NamedTuple):
    """An activation and its derivative's product with a gradient: back(gradient, input)."""

    go: Callable[[Tensor], Tensor]
    back: Callable[[Tensor, Tensor], Tensor]


ACTS = {
    "silu": Act(F.silu, _ops.silu_backward),
    "gelu": Act(F.gelu, _ops.gelu_backward),
    "gelu_tanh": Act(
        lambda x: F.gelu(x, approximate="tanh"),
        lambda g, x: _ops.gelu_backward(g, x, approximate="tanh"),
    ),
    "relu": Act(F.relu, lambda g, x: _ops.threshold_backward(g, x, 0)),
}


class _Active:
    """act(gate), made again for one reader in backward and handed on to the next."""

    def __init__(self, act: str) -> None:
        self.act = ACTS[act]
        self.made: Tensor | None = None

    def again(self, parts: Sequence[Tensor]) -> Tensor:
        """act(gate) ⊙ up of the two parts."""
        self.made = self.act.go(parts[0])
        return self.made * parts[1]

    def take(self, gate: Tensor) -> Tensor:
        """act(gate), which the caller may write to."""
        made, self.made = self.made, None
        return self.act.go(gate) if made is None else made


class _Gated(torch.autograd.Function):
    """(g, u) → act(g) ⊙ u."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, active: _Active) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.active = active
        return active.act.go(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        active: _Active = ctx.active
        made = active.take(gate)
        du = made.mul_(g) if ctx.needs_input_grad[1] else None
        return active.act.back(g * up, gate) if ctx.needs_input_grad[0] else None, du, None


def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) ⊙ up, all (…, D); noted as made from the two."""
    active = _Active(act)
    return note(_Gated.apply(gate, up, active), gate, up, again=active.again)  # type: ignore[arg-type]


def act_of(module: nn.Module, names: tuple[str, str, str]) -> str | None:
    """The activation of a feed-forward whose gate, up and out are these children; None if another.

    Its forward is tried on a shallow copy with small new linears in their places.
    """
    like = {"bias": False, "dtype": torch.float32, "device": "cpu"}
    # Drawing random weights would change every random number after.
    shapes = ((3, 5), (3, 5), (5, 2))
    made: list[Any] = [nn.utils.skip_init(nn.Linear, *shape, **like) for shape in shapes]
    twin = copy(module)
    twin._modules = {**module._modules, **dict(zip(names, made, strict=True))}
    x = torch.linspace(-6, 6, 63).view(21, 3)
    fp32 = torch.autocast("cpu", enabled=False)
    with torch.no_grad(), fp32, torch.random.fork_rng(devices=()):  # it may drop some, then differs
        for linear, scale in zip(made, (1.0, 0.7, 0.3), strict=True):
            shape = linear.weight.shape
            linear.weight.copy_((torch.arange(shape.numel()) % 7 - 3).view(shape) * scale)
        try:
            told = type(module).forward(twin, x)  # past all hooks
        except Exception:  # whatever it does, it is no plain gated feed-forward
            return None
        gate, up, out = made
        if not isinstance(told, Tensor):
            return None
        for name, act in ACTS.items():
            ours = out(act.go(gate(x)) * up(x))
            if ours.shape == told.shape and torch.allclose(ours, told, rtol=1e-6, atol=1e-6):
                return name
    return None
