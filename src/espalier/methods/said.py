"""Fine-tuning in a random subspace (Aghajanyan et al. 2020, arXiv 2012.13255).

    θ_k = θ0_k + λ_k P_k(x),   x (d,) one for the whole model,   P_k: R^d → R^{D_k} fixed and random

SAID trains x and one λ_k per tensor (structure-aware), DID x alone. `dimension` counts both: with
m tensors d = dimension - m, so that exactly `dimension` scalars train, and all the model's change.
The smallest that reaches 90 % of full tuning is a task's intrinsic dimension, which
`espalier dimension` measures.

x starts at zero and λ at one: a fresh adapter changes nothing. P_k is a Fastfood map of norm 1 in
the mean (plain/fastfood.py), made again from the seed and the tensor's name in each pass, and its
gradient is the true adjoint, in which every tensor has its weight. (The paper's code divides each
tensor's gradient by N_k, which favours small tensors; and it lets tensors smaller than d see only
the first N_k coordinates, where here x is folded.) A pass costs what full tuning's does and some
products of Hadamard matrices besides; merge it to serve at no cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from espalier.deltas import Delta
from espalier.errors import SettingError
from espalier.modules import base_modules
from espalier.places import Site, Sites
from espalier.plain.subspace import Projected, Subspace, maps, without_new_head
from espalier.plain.whole import chosen
from espalier.recipes import Method, check


@dataclass(frozen=True)
class IntrinsicSAID(Method):
    """Train the whole model along few random directions.

    Args:
        dimension: How many scalars train: the directions, and a factor for each tensor.
        seed: Which directions; with the tensors' names it says all.
        structure: Train a factor for each tensor (SAID); False trains the directions alone (DID).
        sites: Which parameters: "all" but a new task head's, which is trained beside it, or a
            selector of roles or names such as "attention.*" or "block@last2".
    """

    trains_base: ClassVar[bool] = True

    dimension: int = 20_000
    seed: int = 0
    structure: bool = True
    sites: str = "all"

    def __post_init__(self) -> None:
        whole = isinstance(self.dimension, int) and not isinstance(self.dimension, bool)
        check(self, "dimension", whole and self.dimension >= 1, "a whole number of at least 1")
        seed = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        check(self, "seed", seed, "a whole number")
        check(self, "structure", isinstance(self.structure, bool), "True or False")
        check(self, "sites", isinstance(self.sites, str), "a selector such as 'attention.*'")
        # Adam moves every coordinate by the rate r, and the loss by r · |∂loss/∂x|₁ ~ r · d: this
        # makes a step as bold for any dimension.
        object.__setattr__(self, "learning_rate", min(0.02, 2 / self.dimension))

    def deltas(self, model: nn.Module, places: Sites) -> list[Delta]:
        """One delta per module that owns selected parameters; a tied tensor moves once."""
        everything = self.sites.strip() == "all"
        keys = without_new_head(model) if everything else chosen(model, places, self.sites)
        parts = maps(base_modules(model), keys, self.seed)
        tensors = sum(part.counted for own in parts.values() for part in own.values())
        length = self.dimension - tensors * self.structure
        if length < 1:
            raise SettingError(
                f"IntrinsicSAID(dimension={self.dimension}): there are {tensors} tensors with a "
                f"factor each; take a dimension above {tensors}, fewer sites, or structure=False"
            )
        space = Subspace(length, tensors, self.structure)
        return [
            Projected(Site("parameter", path, "parameter", None, "", 0, 0), own, space)
            for path, own in parts.items()
        ]
