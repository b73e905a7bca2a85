"""Serial adapters: a bottleneck after what a part of a layer gives, with a residual around it.

    a(h) = h + s · (φ(h Downᵀ + c) Upᵀ + e),   Down (M, D), Up (D, M)

Houlsby et al. 2019, arXiv 1902.00751: two per layer, after the out-projections of attention and of
the feed-forward part (and of cross attention), before dropout and the residual sum; φ = swish.
Pfeiffer et al. 2021, arXiv 2005.00247: one per layer, after the residual sum v = FFN(x) + x; φ =
ReLU. A layer that ends in a norm has it twice: v = norm(FFN(x) + x), then
norm(s · up φ(down v) + FFN(x) + x). Any other gives a(v).
AdapterDrop (Rücklé et al. 2021, arXiv 2010.11918): `drop="robust"` leaves the adapters of the
lowest k layers out of each training pass, k ~ U{0 … L − 1}; then `esp.skip_layers` serves any k.
One fixed k is a selector, such as sites="block@4-".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from espalier.deltas import Delta
from espalier.errors import SiteError
from espalier.modules import base_modules
from espalier.places import Site, Sites
from espalier.plain.bottleneck import (
    INITS,
    Depth,
    DrawingSerial,
    Form,
    Serial,
    check_form,
    check_scale,
    norms_in,
    refuse_pieces,
    trained_norms,
)
from espalier.recipes import Method, check

STYLES = {"houlsby": "swish", "pfeiffer": "relu"}


@dataclass(frozen=True)
class SerialAdapter(Method):
    """A bottleneck after the parts of a layer (Houlsby) or after the layer (Pfeiffer).

    Args:
        style: "houlsby" or "pfeiffer".
        bottleneck: M; None for D / reduction.
        reduction: D / M where no bottleneck is given.
        nonlinearity: φ: relu, gelu, gelu_new, silu (or swish), tanh, linear; "auto" by style.
        init: "zero_up" starts as the identity: Down uniform in ±1/√D, Up zero. The papers' starts
            are only near it: "bert" N(0, 0.02²), "houlsby" N(0, 0.01²) cut at two σ.
        scale: s; "learned" trains one per adapter, from 1.
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
        check_form(self, "auto")
        check_scale(self)
        fits = isinstance(self.reduction, int | float) and self.reduction > 0
        check(self, "reduction", fits, "above 0")
        check(self, "init", self.init in INITS, f"one of {', '.join(INITS)}")
        check(self, "norms", isinstance(self.norms, bool), "True or False")
        check(self, "drop", self.drop in ("none", "robust"), "'none' or 'robust'")

    @property
    def identity(self) -> bool:
        """Only where the up-projections start at zero."""
        return self.init == "zero_up"

    def deltas(self, model: nn.Module, places: Sites) -> list[Delta]:
        """One bottleneck per site, and copies of the norms that train beside them."""
        chosen = places.select(self._selector(places))
        found = [self._make(Serial, site) for site in chosen]
        if self.drop == "robust":
            found[0] = self._make(DrawingSerial, chosen[0])
            depth = Depth(1 + max(site.layer or 0 for site in chosen))
            for delta in found:
                delta.depth = depth
        if self.style == "pfeiffer":
            modules = base_modules(model)
            for delta in found:
                refuse_pieces(modules[delta.site.path], delta.site)
                delta.watches = norms_in(delta.site, places)
        return [*found, *(trained_norms(model, places, found) if self.norms else ())]

    def build(self, site: Site) -> Delta:
        """A bottleneck as wide as what the host gives."""
        return self._make(Serial, site)

    def _selector(self, places: Sites) -> str:
        if self.sites != "auto":
            return self.sites
        if self.style == "pfeiffer":
            return "block"
        return "attention.o, ffn.out" + (", cross.o" if "cross.o" in places.roles else "")

    def _make(self, kind: type[Serial], site: Site) -> Serial:
        whole = self.style == "pfeiffer"
        if whole != (site.role == "block") or site.kind not in ("linear", "conv1d", "block"):
            takes = "whole layers (sites='block')" if whole else "linear layers ('attention.o')"
            raise SiteError(
                f"SerialAdapter(style={self.style!r}) stands after {takes}, not after "
                f"{site.role!r} at {site.path or 'the root'}, a {site.kind}"
            )
        phi = STYLES[self.style] if self.nonlinearity == "auto" else self.nonlinearity
        form = Form(phi, self.init, self.scale, self.dropout)
        width = self.bottleneck or max(1, int(site.n_out / self.reduction))
        delta = kind(site, form, **form.numbers(site.n_out, width, site.n_out))
        delta.watches = ()  # what enters a span does not matter here
        return delta
