"""Serial adapters: a bottleneck after what a layer computes, with a residual around it.

    a(h) = h + s · (φ(h Downᵀ + c) Upᵀ + e),   Down (M, D), Up (D, M)

Houlsby et al. 2019, arXiv 1902.00751: two per layer, after the out-projections of attention and of
the feed-forward part (and of cross attention), before dropout and the residual sum; φ = swish.
Pfeiffer et al. 2021, arXiv 2005.00247: one per layer, after the feed-forward part u = FFN(x), with
the residual sum inside; φ = ReLU. In a block that ends in a norm v = LN(u + x), the norm acts twice,
LN(up φ(down v) + u + x); elsewhere it is v + up φ(down v) with v = u + x.
AdapterDrop (Rücklé et al. 2021, arXiv 2010.11918): `drop="robust"` leaves the adapters of the lowest
k layers out of each training pass, k ~ U{0 … L − 1}; then `esp.skip_layers` serves any k. A fixed k
is a selector, such as sites="block@4-".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from espalier.deltas import Delta
from espalier.errors import SiteError
from espalier.modules import base_modules
from espalier.places import Site, Sites
from espalier.plain.bottleneck import (
    INITS,
    NONLINEARITIES,
    Depth,
    DrawingSerial,
    Form,
    Serial,
    norms_in,
    trained_norms,
)
from espalier.recipes import Method, check

STYLES = {"houlsby": "swish", "pfeiffer": "relu"}


@dataclass(frozen=True)
class SerialAdapter(Method):
    """A bottleneck after the parts of a layer (Houlsby) or after the whole (Pfeiffer).

    The paper's own starts, "bert" (N(0, 0.02²)) and "houlsby" (normal of σ 0.01, cut at 2 σ), are
    near the identity; "zero_up" is the identity.

    Args:
        style: "houlsby" or "pfeiffer".
        bottleneck: M; None for D / reduction.
        reduction: D / M, used where no bottleneck is given.
        nonlinearity: φ: relu, gelu, gelu_new, silu (or swish), tanh, linear; "auto" by style.
        init: "zero_up" (uniform in ±1/√D, zeros), "bert" or "houlsby".
        scale: s; "learned" trains one per adapter from 1.
        dropout: On the bottleneck, in training only.
        norms: Train the norms of the adapted layers too, as Houlsby et al. do.
        drop: "none", or "robust" for AdapterDrop.
        sites: Where; "auto" for the places of the style in every layer.
    """

    learning_rate: ClassVar[float] = 5e-4

    style: str = "houlsby"
    bottleneck: int | None = None
    reduction: float = 16
    nonlinearity: str = "auto"
    init: str = "zero_up"
    scale: float | str = 1.0
    dropout: float = 0.0
    norms: bool = False
    drop: str = "none"
    sites: str = "auto"

    def __post_init__(self) -> None:
        check(self, "style", self.style in STYLES, f"one of {', '.join(STYLES)}")
        check_widths(self)
        known = self.nonlinearity == "auto" or self.nonlinearity in NONLINEARITIES
        check(self, "nonlinearity", known, f"auto or one of {', '.join(NONLINEARITIES)}")
        check(self, "init", self.init in INITS, f"one of {', '.join(INITS)}")
        check_branch(self)
        check(self, "norms", isinstance(self.norms, bool), "True or False")
        check(self, "drop", self.drop in ("none", "robust"), "'none' or 'robust'")

    @property
    def identity(self) -> bool:
        """Only with the up-projection at zero."""
        return self.init == "zero_up"

    def deltas(self, model: nn.Module, places: Sites) -> list[Delta]:
        """One bottleneck per site, and copies of the norms that train beside them."""
        chosen = places.select(self._selector(places))
        robust = self.drop == "robust"
        depth = Depth(1 + max(site.layer or 0 for site in chosen)) if robust else None
        found: list[Delta] = []
        for site in chosen:
            delta = self._delta(site, DrawingSerial if robust and not found else Serial)
            delta.depth = depth
            delta.watches = self._watched(model, places, site)
            found.append(delta)
        return found + (trained_norms(model, places, found) if self.norms else [])
