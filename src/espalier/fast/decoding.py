"""Low-rank changes of a whole batch without a graph, as when a model writes word by word.

Few words come at a time then, and what costs is not the sums but calls, copies and casts. The
product is added to the host's fresh output in place; of few words it is computed in the factors'
own fp32, also beside a bf16 host, whose own small products take several times as long on a CPU.
Factors are read where they lie: numbers may change without leaving a trace of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from espalier.deltas import Delta, Product
from espalier.fast.switch import enabled

if TYPE_CHECKING:
    from espalier.seat import Seat

FEW = 32  # words up to which a product in fp32 is faster than one in bf16


class Factors(NamedTuple):
    """What one delta adds: s · x Aᵀ Bᵀ, on these columns of the output or on all."""

    down: Tensor  # Aᵀ (D_in, R)
    up: Tensor  # Bᵀ (R, D_out)
    scale: float
    columns: tuple[int, int] | None


class Served:
    """What is live at one host, where all of it is products.

    Args:
        seat: The host's.
        live: (delta, weight) of each.
    """

    __slots__ = ("device", "forward", "host", "kind", "lasting", "live")

    def __init__(self, seat: Seat, live: list[tuple[Delta, float]]) -> None:
        self.host, self.forward = seat.host, type(seat.host).forward
        self.live = live
        self.device = next(iter(live[0][0].t.values())).device
        self.kind = self.device.type
        lasting = all(_lasts(delta) for delta, _ in live)
        self.lasting = self._factors(torch.float32) if lasting else None

    def _factors(self, dtype: torch.dtype) -> list[Factors]:
        """The factors of every delta as they are now."""
        found = []
        for delta, weight in self.live:
            (a, b, scale), rows = product(delta)[:3], delta.site.rows
            columns = None if rows is None else (rows.start, rows.stop)
            down, up = a.detach().to(dtype).t(), b.detach().to(dtype).t()
            found.append(Factors(down, up, scale * weight, columns))
        return found

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call is one for this path: evaluation of one tensor, where the numbers are."""
        return fits(self.host, self.device, self.kind, args, kwargs)

    def __call__(self, x: Tensor) -> Tensor:
        """The host's output with every product added: x (…, D_in), y (…, D_out)."""
        y = self.forward(self.host, x)  # type: ignore[attr-defined]
        into, flat = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        dtype = computed_in(x, len(flat))
        if x.dtype != dtype:
            flat = flat.to(dtype)
        found = self.lasting
        if found is None or dtype != torch.float32:
            found = self._factors(dtype)
        for down, up, scale, columns in found:
            part = into if columns is None else into[:, columns[0] : columns[1]]
            low = torch.mm(flat, down)
            if part.dtype == dtype:
                part.addmm_(low, up, alpha=scale)
            else:
                part.add_(torch.mm(low, up), alpha=scale)
        return y


def served(seat: Seat, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Served | None:
    """What computes this call, if it is a linear with nothing but products, without a graph."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    plans = seat.graft.plans
    try:
        found = plans[seat.path]
    except KeyError:
        found = plans[seat.path] = _found(seat)
    return found if found is not None and found.takes(args, kwargs) else None


def _found(seat: Seat) -> Served | None:
    live = seat.acting(seat.graft.live)
    fine = plain(seat) and all(adds_a_product(d) and side_by_side(d) for d, _ in live)
    return Served(seat, live) if live and fine else None


def side_by_side(delta: Delta) -> bool:
    """Whether the columns that a delta adds to are one slice of the host's."""
    return delta.site.rows is None or delta.site.rows.groups == 1


def _lasts(delta: Delta) -> bool:
    """Whether the fp32 factors are the very numbers that train, and so never out of date."""
    made = product(delta)
    own = {id(value) for value in delta.t.values() if value.dtype == torch.float32}
    return {id(made.a), id(made.b)} <= own


def plain(seat: Seat) -> bool:
    """Whether a seat calls its host's own forward and nothing listens."""
    return not (seat.watchers or seat.scaled or seat.inner is not None)


def adds_a_product(delta: Delta) -> bool:
    """Whether all that a delta does is to add a product to what a linear gives."""
    return is_product(delta) and not delta.stretches


def is_product(delta: Delta) -> bool:
    """Whether what a delta does to the output of a linear is what its `product` says."""
    kind = type(delta)
    return (
        kind.product is not Delta.product
        and kind.before is Delta.before
        and delta.site.kind in ("linear", "conv1d")
        and not (delta.watches or delta.gates or delta.replaces)
    )


def fits(
    host: nn.Module, here: torch.device, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether a call is one for these paths: evaluation of one tensor, where the numbers are."""
    if len(args) != 1 or kwargs or host.training or not enabled():
        return False
    x = args[0]
    return type(x) is Tensor and x.device == here and not torch.is_autocast_enabled(kind)


def computed_in(x: Tensor, words: int, few: int = FEW) -> torch.dtype:
    """The type in which products with so many words are computed."""
    return torch.float32 if words <= few and x.device.type == "cpu" else x.dtype


def product(delta: Delta) -> Product:
    """A delta's product as its numbers are now."""
    made = delta.product(delta.t)
    assert made is not None
    return made
