"""The root mean square norm as one function that keeps x once, in its own type.

    y = w ⊙ x / r,   r = √(mean x² + ε) over the last dimension, in fp32

A module is taken over when its own forward, tried with a small task, computes this with its
`weight` (or with 1 + `weight`) and one of the numbers that it holds as ε.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
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
    x, inverse, w = parts
    return _scaled(x, inverse, w, wide)


def _scaled(x: Tensor, inverse: Tensor, w: Tensor, wide: bool) -> Tensor:
    y = x * inverse  # fp32
    return y.mul_(w).to(x.dtype) if wide else y.to(x.dtype).mul_(w)


@lru_cache(32)
def _number(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, device=device)


def norm_law(module: nn.Module, x: Tensor) -> Law | None:
    """The law of a module that is a root mean square norm of such x (…, D); else None.

    Its forward is tried on a shallow copy with a weight and rows of our own: those of a model may
    be zeros, or all but centred, and say nothing then. In fp32, where little passes for rounding,
    and in the type of x.
    """
    own = module._parameters
    if list(own) != ["weight"] or module._modules or own["weight"] is None:
        return None
    if own["weight"].shape != x.shape[-1:] or x.dtype == torch.float64:  # ours computes in fp32
        return None
    numbers = sorted({v for v in vars(module).values() if isinstance(v, float)})
    laws = [Law(e, o, w) for e in numbers for o in (0.0, 1.0) for w in (False, True)]
    twin = copy(module)
    twin.__dict__.pop("weight", None)  # a trained copy's
    with torch.no_grad():
        for dtype in dict.fromkeys((torch.float32, x.dtype)):
            some, weight = _task(x.shape[-1], dtype, x.device)
            twin._parameters = {"weight": weight}  # type: ignore[dict-item]
            told = type(module).forward(twin, some)
            if not isinstance(told, Tensor) or told.dtype != dtype or told.shape != some.shape:
                return None
            laws = [law for law in laws if _near(rms_norm(some, weight, law), told)]
    return next(iter(laws), None)


def _task(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows (9, D) that are not centred, of sizes that tell one ε from another; a weight (D,)."""
    waves = torch.arange(4 * width, dtype=torch.float32, device=device).sin().view(4, width)
    rows = waves[:3] + 0.5
    some = torch.cat([rows, rows * 1e-3, rows * 30])
    return some.to(dtype), (waves[3] * 0.5 + 1).to(dtype)


def _near(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results differ by rounding alone."""
    slack = 8 * torch.finfo(theirs.dtype).eps
    return bool(torch.isfinite(theirs).all()) and torch.allclose(ours, theirs, slack, slack)
