"""Low-rank changes of a whole batch without a graph, as when a model writes word by word.

Few words come at a time then, and what costs is not the sums but calls, copies and casts. The
product is added to the host's fresh output in place; of few words it is computed in the factors'
own fp32, also beside a bf16 host, whose own small products take several times as long on a CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from espalier.deltas import Delta, Product
from espalier.fast.switch import enabled

if TYPE_CHECKING:
    from espalier.seat import Seat

FEW = 256  # words up to which fp32 is faster than casting the factors


class Term(NamedTuple):
    """What one delta adds: its product made once where it is numbers as they lie in the buffer."""

    delta: Delta
    weight: float
    product: Product | None


def takes(seat: Seat, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call is a linear with nothing but products beside it, without a graph."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    terms = _terms(seat)
    return bool(terms) and fits(seat, terms[0].delta, args, kwargs)


def output(seat: Seat, x: Tensor) -> Tensor:
    """What the seat's host gives with every live product added: x (…, D_in), y (…, D_out)."""
    y = type(seat.host).forward(seat.host, x)  # type: ignore[attr-defined]
    into = y.view(-1, y.shape[-1])
    dtype = computed_in(x, len(into))
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    for delta, weight, made in _terms(seat):
        a, b, scale, _ = made or product(delta)
        rows = delta.site.rows
        part = into if rows is None else into[:, rows.start : rows.stop]
        low = torch.mm(flat, a.to(dtype).t())
        if part.dtype == dtype:
            part.addmm_(low, b.to(dtype).t(), alpha=scale * weight)
        else:
            part.add_(torch.mm(low, b.to(dtype).t()), alpha=scale * weight)
    return y


def _terms(seat: Seat) -> tuple[Term, ...]:
    """What is live at a seat, if all of it is products; found once for each choice of adapters."""
    plans = seat.graft.plans
    found = plans.get(seat.path)
    if found is None:
        live = [(d, w) for name, w in seat.graft.live for d in seat.deltas.get(name, ())]
        together = all(adds_a_product(d) and _side_by_side(d) for d, _ in live)
        fine = together and plain(seat)
        found = plans[seat.path] = tuple(Term(d, w, _lasting(d)) for d, w in live) if fine else ()
    return found


def _side_by_side(delta: Delta) -> bool:
    return delta.site.rows is None or delta.site.rows.groups == 1


def _lasting(delta: Delta) -> Product | None:
    """A delta's product if its factors are the numbers that train, and so never out of date."""
    made = delta.product(delta.t)
    own = [id(value) for value in delta.t.values()]
    return made if made is not None and {id(made.a), id(made.b)} <= set(own) else None


def plain(seat: Seat) -> bool:
    """Whether a seat calls its host's own forward and nothing listens."""
    return not (seat.watchers or seat.scaled or seat.inner is not None)


def adds_a_product(delta: Delta) -> bool:
    """Whether all that a delta does is to add a product to what a linear gives."""
    kind = type(delta)
    return (
        kind.product is not Delta.product
        and kind.before is Delta.before
        and delta.site.kind in ("linear", "conv1d")
        and not (delta.watches or delta.gates or delta.reads_host or delta.replaces)
    )


def fits(seat: Seat, delta: Delta, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is one for these paths: evaluation of one tensor, where the numbers are."""
    if len(args) != 1 or kwargs or seat.host.training or not enabled():
        return False
    x = args[0]
    here = next(iter(delta.t.values())).device
    return type(x) is Tensor and x.device == here and not torch.is_autocast_enabled(here.type)


def computed_in(x: Tensor, words: int) -> torch.dtype:
    """The type in which products are computed."""
    return torch.float32 if words <= FEW and x.device.type == "cpu" else x.dtype


def product(delta: Delta) -> Product:
    """A delta's product as its numbers are now."""
    made = delta.product(delta.t)
    assert made is not None
    return made
