"""Differences under gates that learn which of them are worth keeping, until they are pruned."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.deltas import Delta, Kept, Regime, Tensors, Trained
from espalier.errors import AdapterError
from espalier.places import Site
from espalier.plain.sparse import highest

_BITS = 0xFFFFFFFF


@dataclass(frozen=True)
class HardConcrete:
    """Gates z in [0, 1] that are 0 and 1 with positive probability, and differentiable between.

    z = clip(s·(high − low) + low, 0, 1), s = σ((log u − log(1 − u) + α) / temperature).
    """

    temperature: float
    low: float
    high: float

    def gate(self, alpha: Tensor, u: Tensor | None) -> Tensor:
        """Z for logits α and uniform noise u of their shape; without noise s = σ(α)."""
        logits = alpha if u is None else (torch.logit(u) + alpha) / self.temperature
        return (torch.sigmoid(logits) * (self.high - self.low) + self.low).clamp(0, 1)

    def alive(self, alpha: Tensor) -> Tensor:
        """P(z ≠ 0) for logits α."""
        return torch.sigmoid(alpha - self.temperature * math.log(-self.low / self.high))


class Pruning(Regime):
    """Gates that are sampled and penalised, then decided for good: at ±∞ they are 1 or 0.

    An infinite logit gives its gate exactly, whatever the noise, has no gradient, and no optimiser
    moves it. So the decision is part of the trained numbers, and is saved and resumed with them.

    Args:
        law: Of the gates.
        penalty: λ of λ Σ P(z ≠ 0).
        count: How many scalars are kept.
        settle: For which share of the steps, the last ones, the gates are decided.
        slow: Before that a difference is this times w, with the gradient of w itself: an optimiser
            moves it by that much less, and goes on with the same moments afterwards.
    """

    def __init__(
        self, law: HardConcrete, penalty: float, count: int, settle: float, slow: float
    ) -> None:
        super().__init__()
        self.law, self.weight, self.count, self.share = law, penalty, count, settle
        self.slow = slow
        # Seed, and steps done: all that the noise is made of.
        self.noise = Kept((2,), _seeded, whole=True)
        self.decided = False  # known to Python, so that a forward pass asks no tensor

    def start(self, total: int, done: int) -> None:
        """Lay the stages out; decide now if that step is past already."""
        super().start(total, done)
        self._count(done)
        if done >= self._decides:
            self._decide()

    def penalty(self) -> Tensor | None:
        """λ Σ P(z ≠ 0); where tensors have gates too, of the product of both."""
        if self.decided:
            return None
        sums = []
        for delta, name, _ in self._tensors():
            alive = self.law.alive(delta.t[f"{name}.alpha"]).sum()
            group = delta.t.get(f"{name}.group")
            sums.append(alive if group is None else alive * self.law.alive(group).squeeze())
        return self.weight * torch.stack(sums).sum()

    def after_step(self, step: int) -> None:
        """Other noise for the next step; the decision, when its time has come."""
        self._count(step)
        if step == self._decides:
            self._decide()

    @property
    def settled(self) -> bool:
        """Whether the scalars to keep are chosen."""
        return self.decided

    def read(self) -> None:
        """Note in Python whether the gates are decided: all of them are, or none."""
        delta, name, _ = next(self._tensors())
        first = delta.t[f"{name}.alpha"][:1]
        self.decided = not first.is_meta and bool(first.isinf().all())

    def chosen(self) -> tuple[Tensor, Tensor]:
        """The differences (T,) that are kept, and where they lie in the row of all tensors."""
        values, places = [], []
        for delta, name, offset in self._tensors():
            at = (delta.t[f"{name}.alpha"] > 0).nonzero().squeeze(1)
            places.append(at + offset)
            values.append(delta.t[f"{name}.w"].detach()[at])
        return torch.cat(values), torch.cat(places)

    @property
    def _decides(self) -> int:
        """The step after which the gates are decided."""
        return max(1, self.total - round(self.share * self.total))

    def _count(self, done: int) -> None:
        self.deltas[0].t["noise"].data[1] = done

    def _tensors(self) -> Iterator[tuple[Pruned, str, int]]:
        """Every tensor once, with its place in the row, in the row's order."""
        for delta in self.deltas:
            assert isinstance(delta, Pruned)
            for name, (_, offset) in delta.counted.items():
                yield delta, name, offset

    @torch.no_grad()
    def _decide(self) -> None:
        """Keep the T largest |z·w| of all tensors, with the gates that evaluation has."""
        if self.decided:
            return
        scores = (delta.difference(delta.t, name, None).abs() for delta, name, _ in self._tensors())
        kept = highest(scores, self.count)
        for delta, name, offset in self._tensors():
            delta.t[f"{name}.w"].data.mul_(self.slow)
            alpha = delta.t[f"{name}.alpha"].data
            ends = kept.new_tensor((offset, offset + len(alpha)))
            start, stop = torch.searchsorted(kept, ends).tolist()
            alpha.fill_(-math.inf)[kept[start:stop] - offset] = math.inf
            if f"{name}.group" in delta.t:
                delta.t[f"{name}.group"].data.fill_(math.inf)
        self.decided = True


class Pruned(Delta):
    """θ + z ⊙ w for the parameters of one module.

    Args:
        site: The module.
        parts: For each parameter's name its number among all tensors, and where it begins in
            their row.
        ties: Names of those parameters that were counted before, under another name.
        specs: For each tensor's number its trained numbers: "w", "alpha", and "group" or none.
        regime: Shared by all deltas of the method, which this one joins.
    """

    replaces: ClassVar[bool] = True

    def __init__(
        self,
        site: Site,
        parts: Mapping[str, tuple[int, int]],
        ties: Collection[str],
        specs: Mapping[int, Mapping[str, Trained]],
        regime: Pruning,
    ) -> None:
        numbers = {
            f"{name}.{key}": spec
            for name, (number, _) in parts.items()
            for key, spec in specs[number].items()
        }
        super().__init__(site, **numbers, noise=regime.noise)
        self.parts = dict(parts)
        self.counted = {name: part for name, part in parts.items() if name not in ties}
        self.pruning = self.regime = regime
        regime.deltas.append(self)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the host's parameters that have differences."""
        return tuple(self.parts)

    @property
    def idle(self) -> bool:  # type: ignore[override]
        """Whether none of its scalars was kept."""
        kept = (bool((self.t[f"{name}.alpha"] > 0).any()) for name in self.parts)
        return self.pruning.decided and not any(kept)

    def ready(self) -> None:
        """Read whether the gates are decided; the last delta does it for all."""
        if self is self.pruning.deltas[-1]:
            self.pruning.read()

    def effective(self, t: Tensors, own: Tensors, training: bool) -> Tensors:
        """The parameters with the differences that pass the gates, summed before the one cast."""
        sampled = training and not self.pruning.decided
        found = {}
        for name in self.parts:
            base = own[name].detach()
            change = self.difference(t, name, t["noise"] if sampled else None)
            found[name] = (base + change.to(base.device).view_as(base)).to(base.dtype)
        return found

    def difference(self, t: Tensors, name: str, noise: Tensor | None) -> Tensor:
        """Z ⊙ w (n,) of one parameter; sampled with the step's noise, or with the mean gates."""
        w, alpha, group = (t.get(f"{name}.{key}") for key in ("w", "alpha", "group"))
        assert w is not None
        assert alpha is not None
        if not self.pruning.decided and self.pruning.slow != 1:
            w = self.pruning.slow * w.detach() + (w - w.detach())
        number, _ = self.parts[name]
        draw = partial(uniform, noise, w.device) if noise is not None else None
        z = self.pruning.law.gate(alpha, draw and draw(2 * number, len(w)))
        if group is not None:
            z = z * self.pruning.law.gate(group, draw and draw(2 * number + 1, 1))
        return z * w

    def plain(self, t: Tensors) -> Tensors:
        """The kept differences and their places; the first delta has them for all."""
        if self is not self.pruning.deltas[0]:
            return {}
        if not self.pruning.decided:
            raise AdapterError(
                f"the {self.pruning.count:,} scalars to keep are not chosen yet: that happens in "
                "the course of training. Train to the end under esp.Lifecycle(model, steps), as "
                "the trainer does, or have them chosen now: esp.Lifecycle(model, steps=1, done=1)"
            )
        return dict(zip(("values", "indices"), self.pruning.chosen(), strict=True))

    def changed(self, host: nn.Module) -> tuple[int, int | None]:
        """The kept scalars; before they are chosen this module's share of them, spread evenly."""
        if self.pruning.decided:
            kept = (int((self.t[f"{name}.alpha"] > 0).sum()) for name in self.counted)
            return sum(kept), None
        last, name, offset = list(self.pruning._tensors())[-1]
        rate = self.pruning.count / (offset + len(last.t[f"{name}.w"]))
        return sum(
            round((offset + len(self.t[f"{name}.w"])) * rate) - round(offset * rate)
            for name, (_, offset) in self.counted.items()
        ), None


def uniform(key: Tensor, device: torch.device, stream: int, count: int) -> Tensor:
    """Noise (count,) within (0, 1), fp32: a hash of the key (seed, step), a stream and the place.

    A function and no generator: every process, device and recomputation of a step sees the same.
    """
    seed, step = key.to(device).long().unbind()
    first = _mixed(seed, _mixed(step, torch.full_like(step, stream)))
    second = _mixed(step, _mixed(first, seed))
    place = torch.arange(count, device=device)
    return ((_mixed(place ^ first, second) >> 9).float() + 0.5) * 2.0**-23


def _mixed(x: Tensor, key: Tensor) -> Tensor:
    """A hash of 32-bit numbers (in int64, which holds their products) and a key."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _BITS
    x = x ^ key
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _BITS
    return x ^ (x >> 15)


def _seeded(noise: Tensor) -> None:
    """A seed from torch's own generator, the same on any device."""
    noise[0] = int(torch.randint(2**31 - 1, ()))
