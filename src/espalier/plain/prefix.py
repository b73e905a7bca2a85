"""Extra keys and values for an attention: as they are, or made by a small network.

L length, K and V widths of all keys and of all values (h_kv·d_h), D width of the stream, M hidden
width of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional as F
from torch.nn import init

from espalier.deltas import Delta, Tensors, Trained
from espalier.errors import SiteError
from espalier.places import Site


class Prefix(Delta):
    """Keys (L, K) and values (L, V) of L virtual words, which every word attends to."""

    attends = True

    def __init__(self, site: Site, length: int, dropout: float, std: float) -> None:
        keys, values = _widths(site)
        start = partial(init.normal_, std=std)
        super().__init__(
            site,
            keys=Trained((length, keys), start),
            values=Trained((length, values), start),
        )
        self.dropout = dropout
        self.watches = ()  # what enters is nothing to it

    def attend(self, t: Tensors, x: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """The keys (1, L, K) and values (1, L, V)."""
        return _dropped(t, self.dropout, training)


class MadePrefix(Delta):
    """Keys and values that a network makes: [k, v] = tanh(E W₁ᵀ + b₁) W₂ᵀ + b₂.

    E (L, D), W₁ (M, D) and b₁ (M,) are `shared`, W₂ (K + V, M) and b₂ the site's own: the W₂ of
    all layers together are the last layer of the one network of the paper.
    """

    attends = True

    def __init__(self, site: Site, shared: dict[str, Trained], dropout: float) -> None:
        (hidden,) = shared["b1"].shape
        width = sum(_widths(site))
        w2, b2 = (Trained(shape, _like_linear(hidden)) for shape in ((width, hidden), (width,)))
        super().__init__(site, **shared, w2=w2, b2=b2)
        self.dropout = dropout
        self.watches = ()  # what enters is nothing to it

    def attend(self, t: Tensors, x: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """The keys (1, L, K) and values (1, L, V) that the network makes now."""
        return _dropped(self.plain(t), self.dropout, training)

    def plain(self, t: Tensors) -> Tensors:
        """The keys (L, K) and values (L, V), which a `Prefix` serves."""
        low = F.linear(t["e"], t["w1"], t["b1"]).tanh()
        keys, values = F.linear(low, t["w2"], t["b2"]).split(_widths(self.site), -1)
        return {"keys": keys, "values": values}


def shared_layer(length: int, width: int, hidden: int) -> dict[str, Trained]:
    """E, W₁ and b₁ for the `MadePrefix` deltas of one kind of attention; E starts at N(0, 1)."""
    w1, b1 = (Trained(shape, _like_linear(width)) for shape in ((hidden, width), (hidden,)))
    return {"e": Trained((length, width), init.normal_), "w1": w1, "b1": b1}


def _widths(site: Site) -> tuple[int, int]:
    """K and V of an attention. Raises SiteError where they are not known."""
    if site.kv is None:
        raise SiteError(
            f"no prefix can stand at {site.role!r} {site.path}: how wide the keys and values are "
            "that are attended to there is not known; leave it out of `sites`"
        )
    return site.kv


def _like_linear(fan_in: int) -> Callable[[Tensor], object]:
    """Uniform in ±1/√fan_in, as a linear layer's weight and bias start."""
    bound = 1 / math.sqrt(fan_in)
    return partial(init.uniform_, a=-bound, b=bound)


def _dropped(t: Tensors, share: float, training: bool) -> tuple[Tensor, Tensor]:
    keys, values = t["keys"].unsqueeze(0), t["values"].unsqueeze(0)
    if not (share and training):
        return keys, values
    return F.dropout(keys, share), F.dropout(values, share)
