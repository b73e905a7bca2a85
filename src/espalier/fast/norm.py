"""The root mean square norm as one function that keeps x once, in its own type.

    y = w ⊙ x / r,   r = √(mean x² + ε) over the last dimension, in fp32

A module is taken over when its own forward, tried on the first rows that it is given, computes
this with its `weight` (or with 1 + `weight`) and one of the numbers that it holds as ε.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from espalier.fast.made import note


class Law(NamedTuple):
    """What a module turned out to compute."""

    eps: float
    offset: float  # w = offset + weight
    wide: bool  # whether w multiplies before the result is cast


class _Norm(torch.autograd.Function):
    """(x, w, ε) → y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = torch.addcmul(eps, length, length, value=1 / x.shape[-1]).rsqrt_()  # 1 / r
        ctx.save_for_backward(x, w, inverse)
        ctx.mark_non_differentiable(inverse)
        return _scaled(x, inverse, w, wide), inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[override]
        x, w, inverse = ctx.saved_tensors
        g = g * w.float()
        along = (g * x).sum(-1, keepdim=True).mul_(inverse.pow(3))
        dx = g.mul_(inverse).addcmul_(x, along, value=-1 / x.shape[-1])
        return dx.to(x.dtype), None, None, None


def rms_norm(x: Tensor, weight: Tensor, law: Law) -> Tensor:
    """Y (…, D) of x (…, D), noted as made from x; `weight` (D,) gets no gradient."""
    w = weight + law.offset if law.offset else weight
    y, inverse = _Norm.apply(x, w, _number(law.eps, x.device), law.wide)  # type: ignore[misc]
    return note(y, x, inverse, w, again=partial(_again, law.wide))


def _again(wide: bool, parts: Sequence[Tensor]) -> Tensor:
    return _scaled(*parts, wide)


def _scaled(x: Tensor, inverse: Tensor, w: Tensor, wide: bool) -> Tensor:
    y = x * inverse  # fp32
    return y.mul_(w).to(x.dtype) if wide else y.to(x.dtype).mul_(w)


@lru_cache(32)
def _number(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, device=device)


def norm_law(module: nn.Module, x: Tensor) -> Law | None:
    """The law of a module that is a root mean square norm, tried on some of x (…, D); else None."""
    own = module._parameters
    if list(own) != ["weight"] or module._modules or own["weight"] is None:
        return None
    weight = own["weight"].detach()
    if weight.shape != x.shape[-1:]:
        return None
    with torch.no_grad():
        # Rows of very different sizes tell one ε from another.
        some = x.detach().reshape(-1, x.shape[-1])[:3]
        some = torch.cat([some, some * 1e-3, some * 30])
        told = type(module).forward(module, some)
        if not isinstance(told, Tensor) or told.dtype != x.dtype or told.shape != some.shape:
            return None
        numbers = {v for v in vars(module).values() if isinstance(v, float)}
        for law in (Law(e, o, w) for e in numbers for o in (0.0, 1.0) for w in (False, True)):
            if _near(rms_norm(some, weight, law), told):
                return law
    return None


def _near(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results differ by rounding alone."""
    slack = 8 * torch.finfo(theirs.dtype).eps
    return bool(torch.isfinite(theirs).all()) and torch.allclose(ours, theirs, slack, slack)
