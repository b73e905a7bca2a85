"""Ladder side-tuning (Sung, Cho and Bansal 2022, arXiv 2206.06522): no gradient enters the base.

    u₀ = D₀ h₀,   uᵢ = blockᵢ(μᵢ uᵢ₋₁ + (1 − μᵢ) Dᵢ hᵢ),   out = U drop(norm(u_L)),   μᵢ = σ(aᵢ/T)

A narrow copy of each block (widths divided by r, as many heads) reads what the base's block gave,
detached; what comes out at the top takes the place of the stack's own end, before pooler and head.
Dᵢ (d/r, d), U (d, d/r), a (L,). In an encoder-decoder the side's decoder reads the side's encoder.
The base runs without a graph, so training keeps only the narrow blocks' activations and the hᵢ.

The narrow blocks start as parts of the base's: the rows and columns with the largest importance,
head by head; D takes, and U puts back, the dimensions of the stream that these were cut from (the
paper's D and U start at N(0, 0.01²) and learn slowly); a is 0. A fresh ladder changes the model.
The paper's gate weighs the base's states, its program's (and this one) the side's: at the start
both are ½.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from espalier.deltas import Delta
from espalier.places import Sites
from espalier.plain.ladder_stack import Form, ladders
from espalier.recipes import Method, check, check_number

INITS = ("magnitude", "fisher", "random")
PROJECTIONS = ("select", "random")


@dataclass(frozen=True)
class LadderSideTuning(Method):
    """A narrow network beside every stack of the model, which reads its blocks.

    Args:
        reduction: r: widths of the stream, feed-forward and heads are divided by it.
        init: How narrow blocks start: the base's numbers with the largest |w| ("magnitude") or
            Fisher information ("fisher": `esp.calibrate` chooses them on data, which the trainer
            calls; until then as by magnitude), or anew ("random").
        projections: How D and U start: "select" as the chosen dimensions, plus N(0, 0.01²), or
            "random", N(0, 0.01²) alone, as they do with init="random", too.
        temperature: T of the gates.
        dropout: Before U, in training only; within narrow blocks it is the base's, but
            attention has none.
        recompute: Run the narrow blocks again in the backward pass: their activations are not kept
            either, for the time of one more pass through them.
        sites: The blocks beside which one stands: "block" for all; "block, !block@0+4+8" leaves
            layers out, whose μ is then not used.
    """

    learning_rate: ClassVar[float] = 3e-3

    reduction: int = 8
    init: str = "magnitude"
    projections: str = "select"
    temperature: float = 0.1
    dropout: float = 0.0
    recompute: bool = False
    sites: str = "block"

    def __post_init__(self) -> None:
        whole = type(self.reduction) is int and self.reduction >= 2
        check(self, "reduction", whole, "a whole number of at least 2")
        check(self, "init", self.init in INITS, f"one of {', '.join(INITS)}")
        known = self.projections in PROJECTIONS
        check(self, "projections", known, f"one of {', '.join(PROJECTIONS)}")
        check_number(self, "temperature", lambda x: x > 0, "above 0")
        check_number(self, "dropout", lambda x: 0 <= x < 1, "at least 0 and below 1")
        check(self, "recompute", isinstance(self.recompute, bool), "True or False")
        check(self, "sites", isinstance(self.sites, str), "a selector of blocks, such as 'block'")

    @property
    def identity(self) -> bool:
        """False: what comes out is the side's, not the base's."""
        return False

    def deltas(self, model: nn.Module, places: Sites) -> list[Delta]:
        """One ladder per stack."""
        widths = (self.reduction, self.temperature, self.dropout)
        form = Form(*widths, self.init, self.projections, self.recompute)
        return ladders(model, places, self.sites, form)
