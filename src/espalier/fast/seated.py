"""Where a seat may compute its host and its deltas as one function, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from espalier import hosts
from espalier.deltas import Delta
from espalier.fast.decoding import is_product, side_by_side
from espalier.fast.linear import Term, with_products
from espalier.fast.made import in_type
from espalier.fast.switch import enabled

if TYPE_CHECKING:
    from espalier.seat import Seat

Live = list[tuple[Delta, float]]


def takes(seat: Seat, live: Live, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call is a frozen linear with nothing but products beside it, in training."""
    if len(args) != 1 or kwargs or not enabled():
        return False
    if not (torch.is_grad_enabled() or seat.host.training):  # reentrant checkpoints start without
        return False
    if torch.compiler.is_compiling() or seat.inner is not None or seat.scaled:
        return False
    x, host = args[0], seat.host
    if not live or not hosts.multiplies(host, x):
        return False
    if any(delta.stretches for delta, _ in live) and not _stretchable(seat, live):
        return False
    return all(is_product(delta) and side_by_side(delta) for delta, _ in live)


def _stretchable(seat: Seat, live: Live) -> bool:
    """Whether what stretches is alone on its columns and neither weighed nor behind dropout."""
    rows = [delta.site.rows for delta, _ in live]
    starts = {None if one is None else one.start for one in rows}
    alone = len(live) == 1 or (None not in starts and len(starts) == len(live))
    return alone and all(
        weight == 1 and not (delta.dropout and seat.host.training)  # type: ignore[attr-defined]
        for delta, weight in live
        if delta.stretches
    )


def output(seat: Seat, live: Live, x: Tensor) -> Tensor:
    """What the seat's host gives with every live product added."""
    host: nn.Module = seat.host
    x = in_type(x, hosts.computed(x))
    weight, bias = hosts.operands(host, x.dtype)
    drop = seat.graft.drop
    terms: list[Term] = []
    for delta, weighed in live:
        product = delta.product(hosts.tensors(delta, x, host))
        assert product is not None
        share = product.dropout if host.training else 0.0
        seed = drop.seed(x, delta) if share else 0
        rows = delta.site.rows
        columns = slice(None) if rows is None else slice(rows.start, rows.stop)
        a, b, scale, _, stretch = product
        terms.append(Term(a, b, scale * weighed, share, seed, columns, stretch))
    # What a feed-forward computes next keeps its input anyway, and its products are dear to repeat.
    keeps = live[0][0].site.role.startswith("ffn")
    return with_products(x, weight, bias, terms, drop, seat.graft.readers, keeps)
