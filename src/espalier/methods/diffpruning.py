"""Diff pruning: a sparse difference, its places learned (Guo et al. 2021, arXiv 2012.07463).

    θ = θ0 + z ⊙ w,   z hard-concrete gates with logits α,   loss + λ Σ P(z ≠ 0)

Each scalar has a difference w (0 at first) and a logit α; structured, each tensor has one more
logit and z = z_i · z_g, whose penalty is the paper's product P(z_i ≠ 0) · P(z_g ≠ 0) (its code adds
sums of each). So training holds twice the model and AdamW's moments of that: more than full tuning.

First gates are sampled, once per optimiser step: the same sample in all micro-batches, processes
and recomputations. Then the share of scalars with the largest |z·w| over all tensors is kept (exact
top-k, with the gates that evaluation has and not a last sample) and trained on from their raw w,
all others being the base's. What is kept in the end is that sparse difference: values and places,
8 bytes per scalar, `PartialTuning(mask="given")`.

Where this differs from the paper's runs: one course of training with one schedule, where they
restart the optimiser after pruning; gradients are clipped together; and other rates. The paper's
are for thousands of steps: 1e-5 before the choice, 5e-5 after it, 0.1 for the logits, which is
`lr=5e-5, slow=0.2, rate=2000`. A few hundred steps teach nothing so. Here what is kept learns at
1e-2, as the single scalars of other masks do; before the choice, when all of the model moves and
would be wrecked at that, it moves at 1/128 of it. The logits' rate is 0.1 here, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import nn

from espalier.deltas import Delta, Trained
from espalier.places import Site, Sites
from espalier.plain.pruned import HardConcrete, Pruned, Pruning
from espalier.plain.sparse import budget_of, row
from espalier.plain.whole import chosen
from espalier.recipes import Method, check, check_number, recipe


@dataclass(frozen=True)
class DiffPruning(Method):
    """Learn a sparse difference from the base: which scalars change, and by how much.

    Args:
        sites: Which parameters may change: roles or names, as for PartialTuning. A new task head
            is left out and trains whole.
        share: Share of these scalars that is kept.
        settle: For which share of the steps, the last ones, only what is kept is trained.
        structured: A gate for each tensor besides those of its scalars.
        penalty: λ, for each scalar that is expected to change.
        start: The logits' first value; at 5 nearly every gate is open.
        slow: Before the choice, when all differences train, they move at this share of their
            learning rate.
        rate: Learning rate of the logits, in multiples of the differences': 0.1 over 1e-2. A
            larger learning rate wants a smaller multiple, for logits live on a scale of about 5.
        temperature: Of the gates: the lower, the closer to 0 or 1.
        low: Below 0; the gates are stretched from (0, 1) to (low, high) and cut off again.
        high: Above 1.
    """

    learning_rate: ClassVar[float] = 1e-2
    trains_base: ClassVar[bool] = True

    sites: str = "*"
    share: float = 0.005
    settle: float = 0.5
    structured: bool = True
    penalty: float = 1.25e-7
    start: float = 5.0
    slow: float = 1 / 128
    rate: float = 10.0
    temperature: float = 1.0
    low: float = -1.5
    high: float = 1.5

    def __post_init__(self) -> None:
        check(self, "sites", isinstance(self.sites, str), "a selector such as 'block@last2'")
        check(self, "structured", isinstance(self.structured, bool), "True or False")
        rules = {
            "share": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
            "settle": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
            "penalty": (lambda x: x >= 0, "a number of at least 0"),
            "start": (lambda x: abs(x) < 100, "a finite logit, such as 5"),
            "slow": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
            "rate": (lambda x: x > 0, "above 0"),
            "temperature": (lambda x: x > 0, "above 0"),
            "low": (lambda x: x < 0, "below 0, or no gate could close"),
            "high": (lambda x: x > 1, "above 1, or no gate could open"),
        }
        for name, (rule, what) in rules.items():
            check_number(self, name, rule, what)

    def deltas(self, model: nn.Module, places: Sites) -> list[Delta]:
        """One delta per module that owns selected parameters; a tied tensor is gated once."""
        held = row(model, places, chosen(model, places, self.sites))
        law = HardConcrete(self.temperature, self.low, self.high)
        count = budget_of(self.share, held.sizes)
        regime = Pruning(law, self.penalty, count, self.settle, self.slow)
        offsets = [sum(held.sizes[:number]) for number in range(len(held.sizes))]
        specs = {number: self._numbers(size) for number, size in enumerate(held.sizes)}
        return [
            Pruned(
                Site("parameter", path, "parameter", None, "", 0, 0),
                {name: (number, offsets[number]) for name, number in parts.items()},
                held.ties.get(path, ()),
                specs,
                regime,
            )
            for path, parts in held.parts.items()
        ]

    def _numbers(self, size: int) -> dict[str, Trained]:
        """What one tensor trains; all are vectors, which weight decay leaves alone."""
        logits = {"alpha": size, "group": 1} if self.structured else {"alpha": size}
        start = partial(nn.init.constant_, val=self.start)
        gates = {key: Trained((n,), start, rate=self.rate) for key, n in logits.items()}
        return {"w": Trained((size,)), **gates}

    def plain(self, deltas: Sequence[Delta] = ()) -> Method:
        """The scalars that were kept, in their places."""
        kept = {"method": "PartialTuning", "mask": "given"}
        return recipe({**kept, "sites": self.sites, "share": self.share}).methods[0]
