"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv 2106.09685), and its family as settings.

    y = x Wᵀ + c + s · drop(x) Aᵀ Bᵀ,   A (R, D_in), B (D_out, R),   s = α / R

A starts uniform in ±1/√fan_in and B at zero (an embedding the other way round): a fresh adapter
changes nothing. `ranks` gives each place a rank of its own, all with the scale that R has.

rsLoRA  (2312.03732)  s = α / √R, so that the step size does not shrink with the rank
LoRA+   (2402.12354)  B learns λ times as fast, but not on embeddings, whose input is one-hot
DoRA    (2402.09353)  y = c + (m / ρ) ⊙ (x Wᵀ + s · x Aᵀ Bᵀ), m (D_out,), ρ = row norms of W + s·B·A
LoRA-FA (2308.03303)  A stays as it started; backward keeps x Aᵀ instead of x
PiSSA   (2404.02948)  s·B₀A₀ = the R leading singular directions of W; y + s · (x Aᵀ Bᵀ − x A₀ᵀ B₀ᵀ)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn
from torch.nn import init

from espalier.deltas import Delta, Kept, Trained
from espalier.errors import SiteError
from espalier.modules import base_modules
from espalier.places import Site, Sites
from espalier.plain.directed import Directed
from espalier.plain.lowrank import LowRank, LowRankConv, LowRankEmbedding, Unchanged
from espalier.plain.standing import can_fold, ranked, refusal
from espalier.plain.starts import RANDOM, pace, principal, principal_factors
from espalier.plain.whole import replacements
from espalier.recipes import Method, check

BIASES = ("none", "lora_only", "all")
TAKES = (
    "linear layers, ungrouped 2-d convolutions (not with dora) and embeddings (nor with freeze_a "
    "or pissa)"
)


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank change of linear, convolution and embedding weights.

    Args:
        rank: R, the width of the bottleneck.
        ranks: The rank of each selected place in model order, where they differ; 0 adds nothing.
            The scale stays that of `rank`.
        alpha: α; the change is scaled by α / R.
        dropout: Dropout on the branch's input, in training only.
        rslora: Scale by α / √R instead.
        bias: Biases to train beside it: "none", those of the adapted layers ("lora_only"), "all".
        sites: Where: a selector such as "attention.q, attention.v" or "all-linear".
        dora: Train the length of each output's weights apart from their direction (DoRA).
        init: How A starts: "kaiming", "gaussian" (deviation 1/R), "orthogonal" rows, or both
            factors within W: "pissa", or "pissa_niter_4", the same by fast random projections.
        freeze_a: Train B alone (LoRA-FA).
        plus: λ, the factor on B's learning rate (LoRA+; the paper's choice is 16).
    """

    learning_rate: ClassVar[float] = 5e-4

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    bias: str = "none"
    sites: str = "all-linear"
    dora: bool = False
    init: str = "kaiming"
    freeze_a: bool = False
    plus: float = 1.0
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        number = int | float
        whole = type(self.rank) is int and self.rank >= 1
        check(self, "rank", whole, "a whole number of at least 1")
        check(self, "alpha", isinstance(self.alpha, number) and self.alpha > 0, "above 0")
        share = isinstance(self.dropout, number) and 0 <= self.dropout < 1
        check(self, "dropout", share, "at least 0 and below 1")
        for name in ("rslora", "dora", "freeze_a"):
            check(self, name, isinstance(getattr(self, name), bool), "True or False")
        check(self, "bias", self.bias in BIASES, f"one of {', '.join(BIASES)}")
        check(self, "sites", isinstance(self.sites, str), "a selector such as 'attention.q'")
        known = isinstance(self.init, str) and (self.init in RANDOM or principal(self.init))
        check(self, "init", known, f"one of {', '.join(RANDOM)}, pissa, pissa_niter_4")
        check(self, "plus", isinstance(self.plus, number) and self.plus >= 1, "at least 1")
        fits = isinstance(self.ranks, tuple) and all(type(r) is int and r >= 0 for r in self.ranks)
        check(self, "ranks", fits, "whole numbers of at least 0")
        check(self, "dora", not (self.dora and 0 in self.ranks), "False where a rank is 0")
        clash = self.freeze_a and principal(self.init)
        check(self, "freeze_a", not clash, f"False: {self.init} trains the A that it takes from W")
        object.__setattr__(self, "learning_rate", pace(self.init, self.plus))

    @property
    def scale(self) -> float:
        """s, the factor on the change."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def plain(self, deltas: Sequence[Delta] = ()) -> LoRA:
        """The LoRA (DoRA) that serves it; PiSSA's is of twice the rank and needs no other base."""
        if not principal(self.init):
            return replace(self, freeze_a=False)
        alpha = self.alpha * (math.sqrt(2) if self.rslora else 2)
        ranks = tuple(2 * rank for rank in self.ranks)
        return replace(self, rank=2 * self.rank, ranks=ranks, alpha=alpha, init="kaiming")

    def deltas(self, model: nn.Module, places: Sites) -> list[Delta]:
        """One low-rank delta per site, and copies of the biases that train beside them."""
        modules = base_modules(model)
        pairs = ranked(places.select(self.sites), self.rank, self.ranks)
        found = [self._delta(site, modules[site.path], rank) for site, rank in pairs]
        adapted = {delta.site.path for delta in found}
        if self.bias != "none":
            wide = self.bias == "all"
            found += replacements(
                modules, lambda path, name: name == "bias" and (wide or path in adapted)
            )
        return found

    def _delta(self, site: Site, host: Any, rank: int) -> Delta:
        """A low-rank delta shaped for the site's host."""
        if rank == 0:
            return Unchanged(site)
        linear = site.kind in ("linear", "conv1d") and not site.span
        if linear or (site.conv and can_fold(site.conv) and not self.dora):
            numbers = self._numbers(site, host, rank)
            kind = LowRankConv if site.conv else Directed if self.dora else LowRank
            return kind(site, self.scale, self.dropout, **numbers)
        if site.kind == "embedding" and not (self.dora or self.freeze_a or principal(self.init)):
            a = Trained((rank, site.n_in))
            b = Trained((site.n_out, rank), init.normal_)
            return LowRankEmbedding(site, self.scale, host.padding_idx, a=a, b=b)
        raise SiteError(refusal("LoRA", site, TAKES))

    def _numbers(self, site: Site, host: nn.Module, rank: int) -> dict[str, Trained]:
        kernel = site.conv.kernel if site.conv else ()
        shape_a = (rank, site.n_in, *kernel)
        shape_b = (site.n_out, rank, *(1 for _ in kernel))
        b = Trained(shape_b, rate=self.plus)
        length = {"m": Trained((site.n_out,))} if self.dora else {}
        if not principal(self.init):
            a = (Kept if self.freeze_a else Trained)(shape_a, RANDOM[self.init])
            return {"a": a, "b": b, **length}
        start = principal_factors(self.init, host, site, rank, self.scale)
        kept = {"a0": Kept(shape_a, start[0]), "b0": Kept(shape_b, start[1])}
        return {"a": Trained(shape_a), "b": b, **kept, **length}
