"""Compacter (Karimi Mahabadi et al. 2021, arXiv 2106.04647): adapters of Kronecker products.

    a(h) = h + φ(h H_down + c) H_up + e,   H = Σᵢ Aᵢ ⊗ (uᵢ vᵢ),   i = 1 … P

A (P, P, P) is one rule for all layers and both projections; u (P, in/P, R) and v (P, R, out/P) are
each projection's own. P must divide D and M. A starts as N(0, 1e-4²), u and v as Glorot's uniform
of gain √2, the biases c (M) and e (D) at zero. That is near the identity, not quite there: a fresh
branch is some 1e-7 of h.
Compacter stands where Houlsby's adapters do, Compacter++ after the feed-forward part only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import init

from espalier.deltas import Delta, Trained
from espalier.errors import SiteError
from espalier.places import Site, Sites
from espalier.plain.bottleneck import Form, Kronecker, check_form, trained_norms
from espalier.recipes import Method, check


@dataclass(frozen=True)
class Compacter(Method):
    """Serial adapters whose projections are sums of Kronecker products with one shared rule.

    Args:
        plus: Compacter++: after the feed-forward part only.
        bottleneck: M; None for D / reduction, rounded down to a multiple of P (at least P).
        reduction: D / M where no bottleneck is given.
        p: P, the number of products in a sum and the width of the rule's matrices.
        rank: R, of the second factors.
        nonlinearity: φ: relu, gelu, gelu_new, silu (or swish), tanh, linear.
        dropout: On the bottleneck, in training only.
        norms: Train the norms of the adapted layers too, as the paper does.
        sites: Where; "auto" for the places of the variant in every layer.
    """

    learning_rate: ClassVar[float] = 3e-3

    plus: bool = False
    bottleneck: int | None = None
    reduction: float = 32
    p: int = 4
    rank: int = 1
    nonlinearity: str = "gelu"
    dropout: float = 0.0
    norms: bool = False
    sites: str = "auto"

    def __post_init__(self) -> None:
        check(self, "plus", isinstance(self.plus, bool), "True or False")
        check_form(self)
        fits = isinstance(self.reduction, int | float) and self.reduction > 0
        check(self, "reduction", fits, "above 0")
        for name in ("p", "rank"):
            value = getattr(self, name)
            check(self, name, type(value) is int and value >= 1, "a whole number of at least 1")
        fits = self.bottleneck is None or self.bottleneck % self.p == 0
        check(self, "bottleneck", fits, f"a multiple of p = {self.p}")
        check(self, "norms", isinstance(self.norms, bool), "True or False")

    @property
    def identity(self) -> bool:
        """No: the rule starts small, not at zero."""
        return False

    def deltas(self, model: nn.Module, places: Sites) -> list[Delta]:
        """One bottleneck per site, all with one rule, and copies of the norms beside them."""
        rule = Trained((self.p, self.p, self.p), _tiny)
        found: list[Delta] = [
            self._make(site, rule) for site in places.select(self._selector(places))
        ]
        return [*found, *(trained_norms(model, places, found) if self.norms else ())]

    def build(self, site: Site) -> Delta:
        """A bottleneck with a rule of its own."""
        return self._make(site, Trained((self.p, self.p, self.p), _tiny))

    def _selector(self, places: Sites) -> str:
        if self.sites != "auto":
            return self.sites
        if self.plus:
            return "ffn.out"
        return "attention.o, ffn.out" + (", cross.o" if "cross.o" in places.roles else "")

    def _make(self, site: Site, rule: Trained) -> Delta:
        p, width = self.p, site.n_out
        if site.kind not in ("linear", "conv1d"):
            raise SiteError(
                f"Compacter stands after linear layers, not after {site.role!r} at {site.path}, "
                f"a {site.kind}"
            )
        if width % p:
            raise SiteError(f"Compacter(p={p}): p does not divide {site.path}'s width of {width}")
        low = self.bottleneck or max(p, int(width / self.reduction) // p * p)
        form = Form(self.nonlinearity, dropout=self.dropout)
        numbers = {
            "down_u": Trained((p, width // p, self.rank), _glorot),
            "down_v": Trained((p, self.rank, low // p), _glorot),
            "up_u": Trained((p, low // p, self.rank), _glorot),
            "up_v": Trained((p, self.rank, width // p), _glorot),
        }
        delta = Kronecker(site, form, rule=rule, **numbers, **form.vectors(low, width))
        delta.watches = ()  # what enters a span does not matter here
        return delta


def _tiny(rule: Tensor) -> None:
    init.normal_(rule, std=1e-4)


def _glorot(factors: Tensor) -> None:
    for factor in factors:
        init.xavier_uniform_(factor, gain=math.sqrt(2))
