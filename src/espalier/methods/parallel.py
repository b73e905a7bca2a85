"""Parallel adapters (He et al. 2021, arXiv 2110.04366): a bottleneck beside a part of a layer.

    h ← h + s · (φ(x Downᵀ + c) Upᵀ + e),   Down (M, D_in), Up (D_out, M)

h is what the part gives, before dropout and the residual sum, and x what it is given. In layers
that begin with a norm two readings of x are in use: what the part is given after the norm
(`reads="input"`), and the residual stream before it (`reads="residual"`, the paper's code for its
feed-forward adapters there). In layers that end in a norm both are the same. Beside attention the
change is added after the out-projection (`adds_to="output"`) or, as in the paper's code, to the
concatenated heads before it (`adds_to="heads"`).
Down starts uniform in ±1/√D and Up at zero, so that a fresh adapter changes nothing. The paper
takes M = 512 and s = 4 for generation, 16 and 2 for GLUE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from espalier.deltas import Delta, Trained
from espalier.errors import SiteError
from espalier.modules import base_modules
from espalier.places import Site, Sites
from espalier.plain.bottleneck import (
    Form,
    Parallel,
    ParallelHeads,
    block_of,
    check_form,
    check_scale,
    norms_in,
    refuse_pieces,
)
from espalier.recipes import Method, check

READS = ("input", "residual")
ADDS_TO = ("output", "heads")


@dataclass(frozen=True)
class ParallelAdapter(Method):
    """A bottleneck beside the feed-forward part, an attention, a layer or a single linear.

    Args:
        bottleneck: M.
        scale: s; "learned" trains one per adapter, from 1.
        nonlinearity: φ: relu, gelu, gelu_new, silu (or swish), tanh, linear.
        dropout: On the bottleneck, in training only.
        reads: "input" for what the part is given, "residual" for the stream before the norm.
        adds_to: "output" of the part, or the "heads" of an attention before its out-projection.
        sites: Where: "ffn", "attention", "cross", "block" or single layers.
    """

    learning_rate: ClassVar[float] = 5e-4

    bottleneck: int = 512
    scale: float | str = 4.0
    nonlinearity: str = "relu"
    dropout: float = 0.0
    reads: str = "input"
    adds_to: str = "output"
    sites: str = "ffn"

    def __post_init__(self) -> None:
        check(self, "bottleneck", self.bottleneck is not None, "a whole number of at least 1")
        check_form(self)
        check_scale(self)
        check(self, "reads", self.reads in READS, f"one of {', '.join(READS)}")
        check(self, "adds_to", self.adds_to in ADDS_TO, f"one of {', '.join(ADDS_TO)}")
        both = self.adds_to == "heads" and self.reads == "residual"
        check(self, "reads", not both, "'input' where the change is added to the heads")

    def deltas(self, model: nn.Module, places: Sites) -> list[Delta]:
        """One bottleneck per site."""
        chosen = places.select(self.sites)
        if self.adds_to == "heads":
            return [self._before_projection(site, places) for site in chosen]
        if self.reads == "residual":
            modules = base_modules(model)
            return [self._on_the_stream(site, places, modules) for site in chosen]
        return [self.build(site) for site in chosen]

    def build(self, site: Site) -> Delta:
        """A bottleneck from what enters a site to what leaves it."""
        if site.kind not in ("linear", "conv1d", "block"):
            raise SiteError(
                "ParallelAdapter stands beside linear layers and parts of layers, not beside "
                f"{site.role!r} at {site.path}, a {site.kind}"
            )
        return Parallel(site, self._form, **self._numbers(site))

    def _on_the_stream(self, site: Site, places: Sites, modules: Mapping[str, nn.Module]) -> Delta:
        if site.role not in ("attention", "cross", "ffn"):
            raise SiteError(
                f"ParallelAdapter(reads='residual'): {site.role!r} at {site.path} is no part of a "
                "layer with a residual stream around it; it takes attention, cross and ffn"
            )
        block = block_of(site, places)
        refuse_pieces(modules[block.path], block)
        norms = norms_in(block, places)
        first = [
            str(other.enter)
            for other in places.whole
            if other.role == "attention" and other.path.startswith(block.path + ".")
        ]
        if not norms or not first:
            raise SiteError(
                f"ParallelAdapter(reads='residual'): {block.path} has no "
                f"{'attention' if norms else 'norm'} by which to tell its residual stream; use "
                "reads='input'"
            )
        delta = Parallel(site, self._form, **self._numbers(site))
        delta.norms = norms
        delta.watches = tuple(dict.fromkeys((*delta.watches, *norms, *first, block.path)))
        return delta

    def _before_projection(self, site: Site, places: Sites) -> Delta:
        if site.role not in ("attention", "cross"):
            raise SiteError(
                f"ParallelAdapter(adds_to='heads'): {site.role!r} at {site.path} has no heads; it "
                "takes attention and cross"
            )
        heads = next(o.n_in for o in places.whole if o.path == site.path and not o.span)
        site = replace(site, n_out=heads)
        return ParallelHeads(site, self._form, **self._numbers(site))

    @property
    def _form(self) -> Form:
        return Form(self.nonlinearity, scale=self.scale, dropout=self.dropout)

    def _numbers(self, site: Site) -> dict[str, Trained]:
        return self._form.numbers(site.n_in, self.bottleneck, site.n_out)
