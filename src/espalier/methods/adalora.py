"""AdaLoRA: a low-rank change whose ranks are learned (Zhang et al. 2023, arXiv 2303.10512).

    y = x Wᵀ + c + s · P (λ ⊙ Q drop(x)),   P (D_out, R), λ (R,), Q (R, D_in),   s = α / R

P and Q start normal with a deviation of 0.02 and λ at zero: a fresh adapter changes nothing. All
places start with rank R. While it trains, the triplets (pᵢ, λᵢ, qᵢ) of all places are compared by
their importance, and λᵢ of the least important is set to zero, until `target` per place are left
on average (espalier.plain.adaptive). A penalty keeps P and Q close to orthogonal:

    γ · mean over all P and Q of ‖PᵀP − I‖ and ‖QQᵀ − I‖

The paper squares these norms and adds them up; their program and peft's take the mean of the norms,
as is done here. What serves is a LoRA with a rank for each place.

The schedule needs the number of steps: `esp.train`, `AdapterCallback` and `Lifecycle` know it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from espalier.deltas import Delta
from espalier.errors import SiteError
from espalier.places import Site, Sites
from espalier.plain.adaptive import Allocation, Triplets
from espalier.plain.standing import refusal
from espalier.recipes import Method, check, check_number, recipe


@dataclass(frozen=True)
class AdaLoRA(Method):
    """Low-rank change of linear weights whose rank at each place is learned.

    Defaults lie near the authors' runs: on MNLI and RTE they have a `start` of 0.09 and 0.15, an
    `end` of 0.58 and 0.46 and an `orthogonality` of 0.1 and 0.3; `rank` is one and a half times
    `target`, as they advise.

    Args:
        rank: R, the rank that every place starts with.
        target: The final rank, on average over all places.
        alpha: α; the change is scaled by α / R, also once ranks have shrunk.
        dropout: Dropout on the branch's input, in training only.
        sites: Where: a selector of linear layers.
        orthogonality: γ, the weight of the penalty.
        start: Share of all steps before anything is pruned.
        end: Share of all steps, the last ones, in which the ranks are final. Only then can an
            adapter be kept as the best.
        interval: Steps from one pruning to the next; λ can grow back in between.
        beta1: How slowly the mean of a number's sensitivity follows.
        beta2: How slowly the mean of its uncertainty follows.
    """

    learning_rate: ClassVar[float] = 2e-3

    rank: int = 12
    target: int = 8
    alpha: float = 32.0
    dropout: float = 0.0
    sites: str = "all-linear"
    orthogonality: float = 0.1
    start: float = 0.1
    end: float = 0.5
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        for name in ("rank", "target", "interval"):
            value = getattr(self, name)
            check(self, name, type(value) is int and value >= 1, "a whole number of at least 1")
        check(self, "target", self.target <= self.rank, f"at most rank, {self.rank}")
        for name in ("alpha", "dropout", "orthogonality", "start", "end", "beta1", "beta2"):
            check_number(self, name, lambda x: x >= 0, "a number of at least 0")
        check(self, "alpha", self.alpha > 0, "above 0")
        check(self, "dropout", self.dropout < 1, "below 1")
        for name in ("beta1", "beta2"):
            check(self, name, 0 < getattr(self, name) < 1, "above 0 and below 1")
        apart = self.start + self.end < 1
        check(self, "end", apart, f"below 1 - start, {1 - self.start:g}: between them is pruned")
        check(self, "sites", isinstance(self.sites, str), "a selector such as 'attention.q'")

    def plain(self, deltas: Sequence[Delta] = ()) -> Method:
        """The LoRA with the ranks that stand; without numbers, one that is as large."""
        shared = {"method": "LoRA", "dropout": self.dropout, "sites": self.sites}
        ranks = [delta.rank for delta in deltas if isinstance(delta, Triplets)]
        if ranks:
            settings = {"rank": self.rank, "alpha": self.alpha, "ranks": ranks}
        else:
            settings = {"rank": self.target, "alpha": self.alpha * self.target / self.rank}
        return recipe({**shared, **settings}).methods[0]

    def deltas(self, model: nn.Module, places: Sites) -> list[Delta]:
        """Triplets at every selected place, which one schedule prunes together."""
        betas, share = (self.beta1, self.beta2), (self.start, self.end)
        regime = Allocation(self.target, share, self.interval, betas, self.orthogonality)
        regime.deltas = [self.build(site) for site in places.select(self.sites)]
        for delta in regime.deltas:
            delta.regime = regime
        return list(regime.deltas)

    def build(self, site: Site) -> Delta:
        """The triplets of one place."""
        if site.span or site.kind not in ("linear", "conv1d"):
            raise SiteError(refusal("AdaLoRA", site, "linear layers"))
        return Triplets(site, self.rank, self.alpha / self.rank, self.dropout)
