"""Rotary embedding in place of the model's own function: three passes instead of five.

    y₁ = x₁ ⊙ c₁ − x₂ ⊙ s₁,   y₂ = x₂ ⊙ c₂ + x₁ ⊙ s₂      halves of heads (B, h, T, d)

Attention calls its rotary function by a name in its own file. A twin of its forward finds ours
under that name, in that instance alone, if the function was tried and rotates halves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes

Rotate = Callable[..., tuple[Tensor, Tensor]]


class _Rotary(torch.autograd.Function):
    """(x, cos, sin) → y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        y = x * cos
        y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        y[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        half = g.shape[-1] // 2
        dx = g * cos
        dx[..., :half].addcmul_(g[..., half:], sin[..., half:])
        dx[..., half:].addcmul_(g[..., :half], sin[..., :half], value=-1)
        return dx, None, None


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated queries (B, h, T, d) and keys (B, h_kv, T, d); cos and sin (1 or B, T, d)."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)  # type: ignore[return-value]


def rotating_twin(owner: type) -> Callable[..., Any] | None:
    """A class's forward with our rotary function in place of its own; None if it has none."""
    return _twin(owner.forward)


@lru_cache(256)
def _twin(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    if not isinstance(forward, FunctionType):
        return None
    if hasattr(forward, "__wrapped__"):
        return _rewrapped(forward, forward.__wrapped__)
    own = forward.__globals__
    name = next((n for n in forward.__code__.co_names if _rotates(own.get(n))), None)
    if name is None:
        return None
    return _like(forward, {**own, name: _guarded(own[name])}, forward.__closure__)


def _rewrapped(wrapper: FunctionType, inner: Callable[..., Any]) -> Callable[..., Any] | None:
    """A decorator's wrapper (as of arguments' old names) around the twin of what it wraps."""
    twin, cells = _twin(inner), wrapper.__closure__ or ()
    held = [cell for cell in cells if _holds(cell, inner)]
    if twin is None or len(held) != 1:
        return None
    closure = tuple(CellType(twin) if cell is held[0] else cell for cell in cells)
    return _like(wrapper, wrapper.__globals__, closure)


def _holds(cell: CellType, value: object) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # a name of the enclosing function that is not bound yet, or no more
        return False


def _like(function: FunctionType, scope: dict[str, Any], closure: Any) -> FunctionType:
    made = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _guarded(function: Rotate) -> Rotate:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kw: Any) -> Any:
        alike = q.dtype == k.dtype == cos.dtype and cos.shape[-1] == q.shape[-1] == k.shape[-1]
        if args or kw or not alike or cos.dim() != 3 or cos.requires_grad:
            return function(q, k, cos, sin, *args, **kw)
        return rotary(q, k, cos, sin)

    return rotate


def _rotates(function: Any) -> bool:
    """Whether a function of queries, keys, cosines and sines rotates halves."""
    if not isinstance(function, FunctionType):
        return False
    if [*inspect.signature(function).parameters][:4] != ["q", "k", "cos", "sin"]:
        return False
    try:
        with _disable_current_modes():  # the answer is kept: no fake numbers, none that are counted
            numbers = torch.linspace(-2, 2, 2 * 3 * 5 * 8)
            q, k = numbers.view(2, 3, 5, 8).sin(), numbers.view(2, 3, 5, 8)[:, :1].cos()
            cos, sin = numbers[:80].view(2, 5, 8), numbers[-80:].view(2, 5, 8)  # halves differ
            told = function(q, k, cos, sin)
            ours = rotary(q, k, cos, sin)
            return all(torch.allclose(a, b, 1e-6, 1e-6) for a, b in zip(told, ours, strict=True))
    except Exception:  # whatever it computes, it is not this
        return False
