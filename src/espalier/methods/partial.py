"""Training a part of the base's own parameters: θ_S ← θ_S + Δ, everything else frozen.

Attention only (Touvron et al. 2022, arXiv 2203.09795), the last layers (Lee et al. 2019,
arXiv 1911.03090), norms, cross attention (Gheini et al. 2021, arXiv 2104.08771): copies of whole
tensors. Or a fixed sparse mask: the T scalars with the highest Fisher information (FISH, Sung et
al. 2021, arXiv 2111.09839), the largest or smallest |θ|, or random ones, over all that is selected.

A fresh copy or difference changes nothing. What lies below the lowest trained layer keeps nothing
for the backward pass. A tied tensor is trained once, and all its ends follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.deltas import Delta
from espalier.errors import SiteError
from espalier.modules import base_modules
from espalier.places import Site, Sites
from espalier.plain.sparse import Budget, Sparse, budget_of, highest, row
from espalier.plain.whole import chosen, replacements
from espalier.recipes import Method, check

KINDS = ("all", "weight", "bias")
MASKS = ("none", "magnitude", "smallest", "fisher", "random", "given")


@dataclass(frozen=True)
class PartialTuning(Method):
    """Train a part of the base's own parameters.

    Args:
        sites: Which: roles ("attention.*", "norm", "block@last2" for whole layers) or names of
            modules and parameters ("embeddings.*"), weights and biases and all that is in them.
        kinds: "all", or only "weight" (all but biases) or "bias".
        mask: "none" trains whole tensors; "magnitude" the share of scalars with the largest |θ|,
            "smallest" with the smallest, "random" any; "fisher" those that `esp.calibrate` chooses
            on data (the trainer calls it); "given" those that come with the numbers, in an
            adapter that was pruned. A mask leaves a new task head out, which trains whole.
        share: Share of the selected scalars that a mask trains.
    """

    learning_rate: ClassVar[float] = 5e-5
    trains_base: ClassVar[bool] = True

    sites: str = "attention.*"
    kinds: str = "all"
    mask: str = "none"
    share: float = 0.005

    def __post_init__(self) -> None:
        check(self, "sites", isinstance(self.sites, str), "a selector such as 'block@last2'")
        check(self, "kinds", self.kinds in KINDS, f"one of {', '.join(KINDS)}")
        check(self, "mask", self.mask in MASKS, f"one of {', '.join(MASKS)}")
        share = isinstance(self.share, int | float) and 0 < self.share <= 1
        check(self, "share", share, "above 0 and at most 1")
        if self.mask != "none":
            object.__setattr__(self, "learning_rate", 1e-2)  # single scalars take large steps
        elif self.kinds == "bias" or self.sites.strip() == "norm":
            object.__setattr__(self, "learning_rate", 1e-3)  # so do a few vectors

    def deltas(self, model: nn.Module, places: Sites) -> list[Delta]:
        """Copies of the selected parameters, or differences at single scalars of them."""
        modules = base_modules(model)
        keys = [
            (path, name)
            for path, name in chosen(model, places, self.sites)
            if self.kinds == "all" or _is_bias(modules[path], name) == (self.kinds == "bias")
        ]
        if not keys:
            raise SiteError(f"what {self.sites!r} selects has no {self.kinds} to train")
        if self.mask == "none":
            wanted = set(keys)
            return replacements(modules, lambda path, name: (path, name) in wanted)
        held = row(model, places, keys)
        budget = Budget(budget_of(self.share, held.sizes), held.sizes, self._choice(held.tensors))
        return [
            Sparse(
                Site("parameter", path, "parameter", None, "", 0, 0),
                {name: budget.offsets[number] for name, number in parts.items()},
                held.ties.get(path, ()),
                budget,
                measures=self.mask == "fisher",
            )
            for path, parts in held.parts.items()
        ]

    def _choice(self, parameters: Iterable[nn.Parameter]) -> Callable[[Tensor], object] | None:
        """What fills the indices (T,) of a fresh adapter."""
        if self.mask in ("fisher", "given"):
            return None
        score = {
            "magnitude": lambda p: p.detach().abs().float(),
            "smallest": lambda p: -p.detach().abs().float(),
            "random": lambda p: torch.rand(p.shape, device=p.device),
        }[self.mask]
        held = list(parameters)

        def fill(indices: Tensor) -> None:
            if not indices.is_meta:
                indices.copy_(highest((score(p) for p in held), len(indices)))

        return fill


def _is_bias(module: nn.Module, name: str) -> bool:
    own = module._parameters[name]
    return own is not None and own.dim() == 1 and name.endswith("bias")
