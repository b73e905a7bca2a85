"""A linear layer with low-rank products, as one function with a backward of its own.

    y = x Wᵀ + c + Σ s · drop(x) Aᵀ Bᵀ      W (D_out, D_in), A (R, D_in), B (D_out, R)

The products are added into y, and their gradients into that of x, in place: nothing as wide as x
or y is made for them. Kept are x once (others that read it keep the same tensor), the R columns
x Aᵀ, and a seed for each dropout; W gets no gradient. An x that was made from tensors which are
kept anyway (`made`) is made again in backward, and a 4-bit W is unpacked again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from espalier.fast.drop import Drop
from espalier.fast.made import Made, made


class Term(NamedTuple):
    """One product: its factors, scale s, share of dropout and its seed, and the columns of y."""

    a: Tensor
    b: Tensor
    scale: float
    share: float
    seed: int
    columns: slice


@dataclass(slots=True)
class _Plan:
    """What the function needs besides tensors."""

    unpack: Callable[[], Tensor] | None
    drop: Drop
    terms: list[tuple[float, float, int, slice]]
    shape: torch.Size


class _Linear(torch.autograd.Function):
    """(x, W or None, c or None, source, plan, A₁, B₁, A₂, …) → y."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        source: Made | None,
        plan: _Plan,
        *factors: Tensor,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, plan.unpack() if weight is None else weight, bias)  # type: ignore[misc]
        lows = []
        for a, b, (scale, share, seed, columns) in _each(factors, plan):
            low = F.linear(plan.drop(flat, share, seed), a)
            y[:, columns].addmm_(low, b.t(), alpha=scale)
            lows.append(low)
        ctx.plan, ctx.source = plan, source
        reads_x = any(ctx.needs_input_grad[5::2])  # an A that stays as it is needs x Aᵀ alone
        held = () if not reads_x else source.parts if source else (x,)
        ctx.counts = len(factors), len(lows), len(held)
        ctx.save_for_backward(weight, *factors, *lows, *held)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        plan: _Plan = ctx.plan
        weight, *rest = ctx.saved_tensors
        many, few, _ = ctx.counts
        factors, lows, held = rest[:many], rest[many : many + few], rest[many + few :]
        needs_x, _, needs_bias, _, _, *needs = ctx.needs_input_grad
        g = g.reshape(-1, g.shape[-1])
        x = None
        if held:
            x = (ctx.source.again(held) if ctx.source else held[0]).reshape(-1, factors[0].shape[1])
        dx = None
        if needs_x:
            dx = g @ (plan.unpack() if weight is None else weight)  # type: ignore[misc]
        grads: list[Tensor | None] = []
        for index, (a, b, (scale, share, seed, columns)) in enumerate(_each(factors, plan)):
            part = g[:, columns]
            lower = torch.mm(b.t(), part.t())  # (R, N): a thin product is fastest this way round
            if scale != 1:
                lower.mul_(scale)
            da = db = None
            if needs[2 * index]:
                assert x is not None
                da = lower @ plan.drop(x, share, seed)
            if needs[2 * index + 1]:
                db = (lows[index].t() @ part).t()
                db = db.mul_(scale) if scale != 1 else db
            if dx is not None:
                _add(dx, lower, a, plan.drop, share, seed)
            grads += [da, db]
        if dx is not None:
            dx = dx.view(plan.shape)
        return dx, None, g.sum(0) if needs_bias else None, None, None, *grads


def with_products(
    x: Tensor,
    weight: Tensor | Callable[[], Tensor],
    bias: Tensor | None,
    terms: list[Term],
    drop: Drop,
) -> Tensor:
    """x Wᵀ + c with every product added: x (…, D_in), the result (…, D_out).

    Args:
        x: The input.
        weight: W (D_out, D_in), or what unpacks it anew each time.
        bias: c (D_out,) or None.
        terms: The products.
        drop: Where seeds of dropout are looked up.
    """
    held = None if callable(weight) else weight
    unpack = weight if callable(weight) else None
    plan = _Plan(unpack, drop, [term[2:] for term in terms], x.shape)
    factors = [factor for term in terms for factor in term[:2]]
    return _Linear.apply(x, held, bias, made(x), plan, *factors)  # type: ignore[return-value]


def _each(factors: Any, plan: _Plan) -> Any:
    return zip(factors[::2], factors[1::2], plan.terms, strict=True)


def _add(
    dx: Tensor, lower: Tensor, a: Tensor, drop: Drop, share: float, seed: int
) -> None:
    """Add a product's part of the gradient of x, through its dropout."""
    if share:
        dx.add_(drop(lower.t() @ a, share, seed))
    else:
        dx.addmm_(lower.t(), a)
