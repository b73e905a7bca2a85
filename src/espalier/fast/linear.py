"""A linear layer with low-rank products, as one function with a backward of its own.

    y = x Wᵀ + c + Σ s · drop(x) Aᵀ Bᵀ      W (D_out, D_in), A (R, D_in), B (D_out, R)

The products are added into y, and their gradients into that of x, in place: nothing as wide as x
or y is made for them. Kept are x once (others that read it keep the same tensor), the R columns
x Aᵀ, and a seed for each dropout; W gets no gradient. An x that was made from tensors which are
kept anyway (`made`) is made again in backward, and a 4-bit W is unpacked again.

A product may end with a stretch (DoRA's), z + σ ⊙ z of what is there but for c. The gradient of σ
needs z, which comes from y where y is kept, and is computed again where it is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from espalier.fast.drop import Drop
from espalier.fast.made import made

Again = Callable[[Sequence[Tensor]], Tensor]


class Term(NamedTuple):
    """One product: its factors, scale s, share of dropout and its seed, and the columns of y."""

    a: Tensor
    b: Tensor
    scale: float
    share: float
    seed: int
    columns: slice
    stretch: Tensor | None = None  # σ, at least fp32


class Shared:
    """What linears that read one tensor have in common in backward: they add its gradient up in
    place, and a tensor that was made from others is made again once for all of them.
    """

    def __init__(self, readers: Readers) -> None:
        self._readers = weakref.ref(readers)
        self._grad: Tensor | None = None
        self._pass = -1  # the backward pass that added it up
        self.left = 0  # linears whose backward is to come
        self._made: Tensor | None = None

    @property
    def grad(self) -> Tensor | None:
        """The gradient so far; what a pass for some numbers alone left here is none of the next."""
        return self._grad if self._pass == torch._C._current_graph_task_id() else None

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self._grad, self._pass = value, torch._C._current_graph_task_id()

    def done(self) -> None:
        """Let go of what a checkpoint has read again for the backward pass that runs."""
        readers = self._readers()
        if readers is not None:
            readers.rest()

    def again(self, how: Again | None, held: Sequence[Tensor]) -> Tensor:
        """The tensor (N, D_in) from what was held of it."""
        x = held[0] if how is None else self._made
        if x is None:
            assert how is not None
            x = how(held)
        self._made = x if how is not None and self.left > 0 else None
        return x.reshape(-1, x.shape[-1])


class _Read(torch.autograd.Function):
    """x → x, whose gradient is what all linears that read it have added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: Shared) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.shared = shared
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        shared: Shared = ctx.shared
        shared.done()
        added, shared.grad = shared.grad, None
        if g is None or added is None:
            return added if g is None else g, None
        return added + g, None


class Readers:
    """The tensor that was read last, for the next linear that reads it."""

    def __init__(self) -> None:
        self._latest: tuple[weakref.ref[Tensor], tuple[bool, int], Tensor, Shared] | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> Readers:
        return Readers()

    def __reduce__(self) -> tuple[type[Readers], tuple[()]]:
        return Readers, ()

    def of(self, x: Tensor) -> tuple[Tensor, Shared]:
        """X as its linears read it, and what they share."""
        latest = self._latest
        # Read without a graph it has none to share; written to since, it is another.
        stamp = torch.is_grad_enabled(), 0 if x.is_inference() else x._version
        if latest is None or latest[0]() is not x or latest[1] != stamp:
            shared = Shared(self)  # holds no tensor that leads to it, or it would outlive the step
            read: Tensor = _Read.apply(x, shared) if x.requires_grad else x  # type: ignore[assignment]
            self._latest = latest = weakref.ref(x), stamp, read, shared
        return latest[2:]

    def rest(self) -> None:
        """Forget it."""
        self._latest = None


@dataclass(slots=True)
class _Plan:
    """What the function needs besides tensors."""

    unpack: Callable[[], Tensor] | None
    drop: Drop
    shared: Shared
    again: Again | None
    terms: list[tuple[float, float, int, slice]]
    shape: torch.Size
    keeps: bool


class _Witness:
    """Whether a tensor was written to since; holds none of its memory."""

    def __init__(self, x: Tensor) -> None:
        self._alias = x.detach()
        self._alias.data = x.new_empty(0)  # the count of versions stays that of x
        self._version = self._alias._version

    @property
    def intact(self) -> bool:
        return self._alias._version == self._version


class _Linear(torch.autograd.Function):
    """(x, W or None, c or None, parts of x, plan, A₁, B₁, σ₁ or None, A₂, …) → y."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        parts: tuple[Tensor, ...],
        plan: _Plan,
        *factors: Tensor | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        flat = x.reshape(-1, x.shape[-1])
        stretched = any(sigma is not None for sigma in factors[2::3])
        full = plan.unpack() if weight is None else weight  # type: ignore[misc]
        y = F.linear(flat, full, None if stretched else bias)
        lows = []
        for a, b, sigma, (scale, share, seed, columns) in _each(factors, plan):
            low = F.linear(plan.drop(flat, share, seed), a)
            part = y[:, columns].addmm_(low, b.t(), alpha=scale)
            if sigma is not None:
                part.addcmul_(part, sigma.to(y.dtype))
            lows.append(low)
        if stretched and bias is not None:
            y += bias
        ctx.plan = plan
        needs_sigma = any(ctx.needs_input_grad[7::3])
        # A view made in here could not be written to in place, as some models do.
        out = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])
        kept = (y,) if needs_sigma and plan.keeps else ()
        ctx.witness = _Witness(out) if kept else None
        # An A that stays as it is needs x Aᵀ alone.
        reads_x = any(ctx.needs_input_grad[5::3]) or needs_sigma
        held = (parts or (x,)) if reads_x else ()
        plan.shared.left += bool(held)
        ctx.counts = len(factors), len(lows), len(kept)
        ctx.save_for_backward(weight, bias if needs_sigma else None, *factors, *lows, *kept, *held)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        plan: _Plan = ctx.plan
        if g is None:
            return (None,) * (5 + 3 * len(plan.terms))
        weight, bias, *rest = ctx.saved_tensors
        rest = iter(rest)
        factors, lows, kept = (list(islice(rest, count)) for count in ctx.counts)
        held = list(rest)
        needs_x, _, needs_bias, _, _, *needs = ctx.needs_input_grad
        g = g.reshape(-1, g.shape[-1])
        x = None
        if held:
            plan.shared.left -= 1
            x = plan.shared.again(plan.again, held)
        full = cache(lambda: plan.unpack() if weight is None else weight)  # type: ignore[misc]
        y = kept[0] if kept and ctx.witness.intact else None
        grads: list[Tensor | None] = [None] * len(needs)
        whole = g  # with every stretch
        for index, (_, b, sigma, (scale, _, _, columns)) in enumerate(_each(factors, plan)):
            if sigma is None:
                continue
            if needs[3 * index + 2]:
                own = None if y is None else y[:, columns]
                if own is not None and bias is not None:
                    own = own - bias[columns]
                z = partial(_again, x, full, columns, lows[index], b, scale)
                grads[3 * index + 2] = _of_stretch(g[:, columns], sigma, own, z)
            whole = _stretched(whole, g, columns, sigma.to(g.dtype))
        dx = _through(plan, whole, full()) if needs_x else None
        for index, (a, b, _, (scale, share, seed, columns)) in enumerate(_each(factors, plan)):
            part = whole[:, columns]
            # Thin products are fastest this way round: (R, N) and not (N, R).
            lower = _scaled(b.t(), part.t(), scale)
            if needs[3 * index]:
                assert x is not None
                grads[3 * index] = lower @ plan.drop(x, share, seed)
            if needs[3 * index + 1]:
                grads[3 * index + 1] = _scaled(lows[index].t(), part, scale).t()
            if dx is not None and share:
                dx += plan.drop(lower.t() @ a, share, seed)
            elif dx is not None:
                dx.addmm_(lower.t(), a)
        return None, None, g.sum(0) if needs_bias else None, None, None, *grads


def with_products(
    x: Tensor,
    weight: Tensor | Callable[[], Tensor],
    bias: Tensor | None,
    terms: list[Term],
    drop: Drop,
    readers: Readers,
    keeps: bool = False,
) -> Tensor:
    """X Wᵀ + c with every product added: x (…, D_in), the result (…, D_out).

    The columns of a product with a stretch are no other's.

    Args:
        x: The input.
        weight: W (D_out, D_in), or what unpacks it anew each time.
        bias: c (D_out,) or None.
        terms: The products.
        drop: Where masks of dropout are looked up.
        readers: Where others that read x are looked up.
        keeps: Keep y for the gradients of stretches, not compute it again.
    """
    held = None if callable(weight) else weight
    unpack = weight if callable(weight) else None
    source, (read, shared) = made(x), readers.of(x)
    again, parts = (source.again, source.parts) if source else (None, ())
    plan = _Plan(unpack, drop, shared, again, [term[2:6] for term in terms], x.shape, keeps)
    factors = [each for term in terms for each in (term.a, term.b, term.stretch)]
    return _Linear.apply(read, held, bias, parts, plan, *factors)  # type: ignore[return-value]


def _through(plan: _Plan, g: Tensor, weight: Tensor) -> Tensor:
    """The gradient (N, D_in) of x with this layer's part, in the shared tensor itself."""
    shared = plan.shared
    if shared.grad is None:
        shared.grad = (g @ weight).view(plan.shape)
        return shared.grad.view(-1, plan.shape[-1])
    return shared.grad.view(-1, plan.shape[-1]).addmm_(g, weight)


def _again(
    x: Tensor | None,
    weight: Callable[[], Tensor],
    columns: slice,
    low: Tensor,
    b: Tensor,
    scale: float,
) -> Tensor:
    """Columns of x Wᵀ + s · low Bᵀ, (N, …)."""
    assert x is not None
    return F.linear(x, weight()[columns]).addmm_(low, b.t(), alpha=scale)


def _of_stretch(g: Tensor, sigma: Tensor, own: Tensor | None, z: Callable[[], Tensor]) -> Tensor:
    """The gradient (D_out,) of a stretch σ, from what was stretched where that was kept.

    A column that was stretched to nothing tells nothing of its z, which is computed again then.
    """
    if own is not None:
        length = 1 + sigma.to(g.dtype).to(sigma.dtype)
        if bool(length.all()):
            return (g * own).sum(0).to(sigma.dtype) / length
    return z().mul_(g).sum(0).to(sigma.dtype)


def _stretched(whole: Tensor, g: Tensor, columns: slice, stretch: Tensor) -> Tensor:
    """What was made of g so far, `whole`, with these columns stretched; g stays."""
    part = g[:, columns]
    if part.shape == g.shape:
        return torch.addcmul(g, g, stretch)
    whole = g.clone() if whole is g else whole
    whole[:, columns].addcmul_(part, stretch)
    return whole


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """S · a b in one product."""
    return a @ b if scale == 1 else torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _each(factors: Any, plan: _Plan) -> Any:
    return zip(factors[::3], factors[1::3], factors[2::3], plan.terms, strict=True)
