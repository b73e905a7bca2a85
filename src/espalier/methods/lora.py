"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv 2106.09685).

    y = x Wᵀ + c + s · drop(x) Aᵀ Bᵀ,   A (R, D_in), B (D_out, R),   s = α / R

rsLoRA (Kalajdzievski 2023, arXiv 2312.03732): s = α / √R, so that the step size does not shrink
with the rank. A starts uniform in ±1/√fan_in and B at zero (an embedding the other way round), so
a fresh adapter changes nothing. Different ranks at different places are a sum of two LoRAs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import init

from espalier.deltas import Delta, Trained
from espalier.errors import SiteError
from espalier.modules import base_modules
from espalier.places import Conv, Site, Sites
from espalier.plain.lowrank import LowRank, LowRankConv, LowRankEmbedding
from espalier.plain.whole import replacements
from espalier.recipes import Method, check

BIASES = ("none", "lora_only", "all")


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank change of linear, convolution and embedding weights.

    Args:
        rank: R, the width of the bottleneck.
        alpha: α; the change is scaled by α / R.
        dropout: Dropout on the branch's input, in training only.
        rslora: Scale by α / √R instead.
        bias: Biases to train beside it: "none", those of the adapted layers ("lora_only"), "all".
        sites: Where: a selector such as "attention.q, attention.v" or "all-linear".
    """

    learning_rate: ClassVar[float] = 5e-4

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    bias: str = "none"
    sites: str = "all-linear"

    def __post_init__(self) -> None:
        number = int | float
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool)
        check(self, "rank", whole and self.rank >= 1, "a whole number of at least 1")
        check(self, "alpha", isinstance(self.alpha, number) and self.alpha > 0, "above 0")
        share = isinstance(self.dropout, number) and 0 <= self.dropout < 1
        check(self, "dropout", share, "at least 0 and below 1")
        check(self, "rslora", isinstance(self.rslora, bool), "True or False")
        check(self, "bias", self.bias in BIASES, f"one of {', '.join(BIASES)}")
        check(self, "sites", isinstance(self.sites, str), "a selector such as 'attention.q'")

    @property
    def scale(self) -> float:
        """s, the factor on the change."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def deltas(self, model: nn.Module, places: Sites) -> list[Delta]:
        """One low-rank delta per site, and copies of the biases that train beside them."""
        found = [self.build(site) for site in places.select(self.sites)]
        adapted = {delta.site.path for delta in found}
        if self.bias != "none":
            wide = self.bias == "all"
            modules = base_modules(model)
            found += replacements(
                modules, lambda path, name: name == "bias" and (wide or path in adapted)
            )
        return found

    def build(self, site: Site) -> Delta:
        """A low-rank delta shaped for the site's host."""
        if site.span:
            raise SiteError(
                f"LoRA stands on single layers; {site.role!r} is a span from {site.enter} to "
                f"{site.path}. For the layers within it write '{site.role}.*'"
            )
        if site.kind in ("linear", "conv1d"):
            a = Trained((self.rank, site.n_in), _uniform)
            b = Trained((site.n_out, self.rank))
            return LowRank(site, a, b, self.scale, self.dropout)
        if site.conv is not None and _can_fold(site.conv):
            a = Trained((self.rank, site.n_in, *site.conv.kernel), _uniform)
            b = Trained((site.n_out, self.rank, 1, 1))
            return LowRankConv(site, a, b, self.scale, self.dropout)
        if site.kind == "embedding":
            a = Trained((self.rank, site.n_in))
            b = Trained((site.n_out, self.rank), init.normal_)
            return LowRankEmbedding(site, a, b, self.scale)
        what = "a grouped convolution" if site.conv else f"a {site.kind}"
        raise SiteError(
            f"LoRA cannot stand on {site.path}, {what}; "
            "it takes linear layers, ungrouped 2-d convolutions and embeddings"
        )


def _can_fold(conv: Conv) -> bool:
    return conv.groups == 1 and (conv.padding_mode == "zeros" or isinstance(conv.padding, tuple))


def _uniform(a: Tensor) -> None:
    bound = 1 / math.sqrt(a[0].numel())
    init.uniform_(a, -bound, bound)
