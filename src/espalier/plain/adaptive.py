"""Low-rank changes made of triplets (p, λ, q), of which a schedule keeps the most important.

K places start with R triplets each. P (D_out, R) and Q (R, D_in) have the p and q of one place as
columns and rows, λ (R,) their weights. A triplet that is pruned has λ = 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init

from espalier.deltas import Delta, Kept, Product, Regime, Tensors, Trained
from espalier.places import Site
from espalier.plain.lowrank import dropped

TRIPLET = ("p", "e", "q")


class Triplets(Delta):
    """y + s · P (λ ⊙ Q x) on a linear host; λ is called e.

    The running means of each number's sensitivity and of its uncertainty, and which triplets the
    latest allocation let stay, are kept beside them: training stops and goes on as if it had not.

    Args:
        site: Where.
        rank: R.
        scale: s.
        dropout: Dropout on the branch's input, in training only.
    """

    def __init__(self, site: Site, rank: int, scale: float, dropout: float = 0.0) -> None:
        numbers = {
            "p": Trained((site.n_out, rank), _small),
            "e": Trained((rank,)),
            "q": Trained((rank, site.n_in), _small),
        }
        means = {
            f"{what}_{key}": Kept(numbers[key].shape, aside=True)
            for what in ("sensitivity", "uncertainty")
            for key in TRIPLET
        }
        super().__init__(site, **numbers, **means, stays=Kept((rank,), init.ones_, aside=True))
        self.scale = scale
        self.dropout = dropout

    def after(self, t: Tensors, x: Tensor, y: Tensor, training: bool) -> Tensor:
        """The output with the change: x (…, D_in), y (…, D_out)."""
        low = F.linear(dropped(x, self.dropout, training), t["q"])  # (…, R)
        return y + F.linear(low * (t["e"] * self.scale), t["p"])

    def product(self, t: Tensors) -> Product:
        """P and diag(λ) Q."""
        return Product(t["e"].unsqueeze(1) * t["q"], t["p"], self.scale, self.dropout)

    def fold(self, t: Tensors, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s P diag(λ) Q, with W (D_out, D_in)."""
        return w.addmm(t["p"] * t["e"], t["q"], alpha=self.scale), b

    def plain(self, t: Tensors) -> Tensors:
        """A = diag(λ) Q and B = P of the triplets that stand; nothing where none does."""
        keep = standing(t)
        if not keep.any():
            return {}
        return {"a": (t["e"].unsqueeze(1) * t["q"])[keep], "b": t["p"][:, keep]}

    @property
    def rank(self) -> int:
        """How many triplets stand."""
        stays = self.t["stays"]
        return len(stays) if stays.is_meta else int(standing(self.t).sum())

    def changed(self, host: nn.Module) -> tuple[int, int | None]:
        """The whole slice of the weight, by a change of the rank that stands."""
        rank = self.rank
        return self.site.n_in * self.site.n_out * bool(rank), rank


def standing(t: Tensors) -> Tensor:
    """Which triplets (R,) stand: those that stay, and those that have grown back since."""
    return (t["stays"] != 0) | (t["e"] != 0)


class Allocation(Regime):
    """Prunes triplets of all places together, on a cubic schedule, until `target` · K are left.

    A number w with gradient g has sensitivity |w·g| after each step, w being the new one: its
    running mean Ī ← β₁Ī + (1 − β₁)|w·g|, and that of its uncertainty Ū ← β₂Ū + (1 − β₂)||w·g| − Ī|.
    A triplet scores Ī·Ū of its λ plus the means over its p and over its q of the same.

    Args:
        target: Triplets left, on average per place.
        shares: Of all steps, those before the first is pruned, and those after the last was, in
            which what is pruned stays so.
        interval: Steps from one allocation to the next.
        betas: β₁ and β₂.
        weight: γ, that of the penalty.
    """

    def __init__(
        self,
        target: int,
        shares: tuple[float, float],
        interval: int,
        betas: tuple[float, float],
        weight: float,
    ) -> None:
        super().__init__()
        self.target, self.interval, self.betas, self.weight = target, interval, betas, weight
        self.shares = shares
        self.done = self.first = self.last = 0

    def start(self, total: int, done: int) -> None:
        """Lay the schedule out: nothing is pruned up to step `first`, all is settled at `last`."""
        super().start(total, done)
        before, after = (math.floor(share * total + 1e-6) for share in self.shares)
        self.done, self.first, self.last = done, before, total - after

    def penalty(self) -> Tensor | None:
        """γ times the mean over all P and Q of ‖PᵀP − I‖ and ‖QQᵀ − I‖ (Frobenius)."""
        if not self.weight:
            return None
        pairs = [(delta.t["p"], delta.t["q"]) for delta in self.deltas]
        grams = torch.stack([g for p, q in pairs for g in (p.T @ p, q @ q.T)]).float()  # (2K, R, R)
        apart = grams - torch.eye(grams.shape[-1], device=grams.device)
        return self.weight * torch.linalg.vector_norm(apart, dim=(1, 2)).mean()

    def budget(self, step: int) -> int:
        """How many triplets of all places may stand after a step."""
        whole = sum(len(delta.t["e"]) for delta in self.deltas)
        aim = self.target * len(self.deltas)
        if step >= self.last:
            return aim
        left = 1 - max(0, step - self.first) / (self.last - self.first)
        return int((whole - aim) * left**3 + aim)

    def after_step(self, step: int) -> None:
        """Measure, prune where it is time, and at the end keep pruned what was."""
        self.done = step
        if step < self.last:
            self._measure()
        due = self.first < step < self.last and step % self.interval == 0
        if due or step == self.last:
            self._allocate(self.budget(step))
        if due or step >= self.last:
            for delta in self.deltas:
                delta.t["e"].data.masked_fill_(delta.t["stays"] == 0, 0.0)

    def _measure(self) -> None:
        keys = [(delta, key) for delta in self.deltas for key in TRIPLET]
        mean = [delta.t[f"sensitivity_{key}"].data for delta, key in keys]
        spread = [delta.t[f"uncertainty_{key}"].data for delta, key in keys]
        now = torch._foreach_mul([d.t[k].data for d, k in keys], [d.g[k] for d, k in keys])
        torch._foreach_abs_(now)
        _average(mean, now, self.betas[0])
        torch._foreach_sub_(now, mean)
        torch._foreach_abs_(now)
        _average(spread, now, self.betas[1])

    def scores(self) -> Tensor:
        """The importance of every triplet (K · R,), place by place."""
        found: list[Tensor] = []
        for delta in self.deltas:
            p, e, q = (
                delta.t[f"sensitivity_{key}"].float() * delta.t[f"uncertainty_{key}"].float()
                for key in TRIPLET
            )
            found.append(e + p.mean(0) + q.mean(1))
        return torch.cat(found)

    def _allocate(self, budget: int) -> None:
        """Let the `budget` most important triplets stay; of equal ones the earlier."""
        scores = self.scores()
        best = scores.argsort(descending=True, stable=True)[:budget]
        stay = torch.zeros_like(scores).index_fill_(0, best, 1.0)
        sizes = [len(delta.t["e"]) for delta in self.deltas]
        for delta, part in zip(self.deltas, stay.split(sizes), strict=True):
            delta.t["stays"].data.copy_(part)

    def report(self) -> Mapping[str, Sequence[float]]:
        """The rank of each place now."""
        ranks = [delta.rank for delta in self.deltas if isinstance(delta, Triplets)]
        return {"rank": ranks}

    @property
    def settled(self) -> bool:
        """Whether the ranks are final."""
        return self.done >= self.last


def _average(held: Sequence[Tensor], now: Sequence[Tensor], beta: float) -> None:
    """Running means: βh + (1 − β)n, in place."""
    torch._foreach_mul_(list(held), beta)
    torch._foreach_add_(list(held), list(now), alpha=1 - beta)


def _small(w: Tensor) -> None:
    init.normal_(w, std=0.02)
