"""Trained differences at single scalars of the base's own parameters, chosen once and then fixed.

The chosen tensors are seen as one long row of N scalars; `values` (T,) and `indices` (T,),
ascending, are shared by all deltas of a method, so that a budget T is spent where it counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier import hosts
from espalier.deltas import Delta, Kept, Tensors, Trained
from espalier.errors import AdapterError, SiteError
from espalier.modules import base_modules
from espalier.places import Site, Sites
from espalier.plain.whole import refuse_packed


@dataclass(slots=True)
class Row:
    """Chosen tensors laid end to end, a tied one once.

    Attributes:
        tensors: In their order in the row.
        parts: By module's path and parameter's name the tensor's number in the row.
        ties: By path the names of those that were counted before, under another name.
    """

    tensors: list[nn.Parameter] = field(default_factory=list)
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    ties: dict[str, list[str]] = field(default_factory=dict)

    @property
    def sizes(self) -> list[int]:
        """Scalars of each tensor."""
        return [p.numel() for p in self.tensors]


def row(model: nn.Module, places: Sites, keys: Iterable[tuple[str, str]]) -> Row:
    """The row of the parameters at (path, name), without those that only a new task head owns.

    A head that starts at random is no base to keep differences from: it trains whole, beside them.

    Raises:
        SiteError: A parameter is quantised, or none is left.
    """
    modules = base_modules(model)
    owned = {(path, name): p for path, m in modules.items() for name, p in m._parameters.items()}
    based = {id(p) for (path, _), p in owned.items() if path not in places.head}
    found, numbers = Row(), dict[int, int]()
    for path, name in keys:
        p = owned[path, name]
        if p is None or id(p) not in based:
            continue
        refuse_packed(f"{path}.{name}", p)
        if id(p) in numbers:
            found.ties.setdefault(path, []).append(name)
        else:
            found.tensors.append(p)
        found.parts.setdefault(path, {})[name] = numbers.setdefault(id(p), len(numbers))
    if not found.tensors:
        raise SiteError(
            f"only the task head {', '.join(places.head)} is selected, which trains whole: its "
            "base is random. Select parameters of the base"
        )
    return found


class Budget:
    """Which T of N scalars are trained, and where each tensor's share of them lies.

    Args:
        count: T.
        sizes: Scalars of each tensor, in the order of the row.
        choose: Fills the indices (T,) of a fresh adapter; None leaves them to `calibrate`.
    """

    def __init__(
        self, count: int, sizes: Iterable[int], choose: Callable[[Tensor], object] | None
    ) -> None:
        self.offsets = [0]
        for size in sizes:
            self.offsets.append(self.offsets[-1] + size)
        self.values = Trained((count,))
        wide = self.offsets[-1] >= 2**31
        self.indices = Kept((count,), choose or _none_yet, whole=True, wide=wide)
        self.cuts: dict[int, tuple[int, int]] = {}  # by offset, once the indices are known
        self.chosen = False
        self.best: tuple[Tensor, Tensor] | None = None  # of the scores offered so far
        self.offers = 0

    def read(self, indices: Tensor) -> None:
        """Note in Python where the indices (T,) pass from one tensor to the next."""
        ends = torch.tensor(self.offsets, dtype=indices.dtype, device=indices.device)
        if indices.is_meta:  # counts only: spread evenly
            cuts = [round(len(indices) * end / self.offsets[-1]) for end in self.offsets]
        else:
            cuts = torch.searchsorted(indices, ends).tolist()
        self.cuts = dict(zip(self.offsets, pairwise(cuts), strict=False))
        self.chosen = cuts[0] < cuts[-1]

    def offer(self, offset: int, score: Tensor, indices: Tensor) -> None:
        """Take the scores of one tensor; after the last one, write the T highest to `indices`."""
        self.best = _higher(self.best, score, offset, len(indices))
        self.offers += 1
        if self.offers == len(self.offsets) - 1:
            indices.copy_(self.best[1].sort().values)
            self.best, self.offers = None, 0


class Sparse(Delta):
    """θ + Σ vⱼ eⱼ: differences v at fixed places j of a module's own parameters.

    Args:
        site: The module.
        parts: For each parameter's name where it begins in the row.
        ties: Names of those parameters that another delta counts, being tied to one of its own.
        budget: Shared by all deltas of the method.
        measures: Whether the places are chosen by `esp.calibrate`.
    """

    replaces: ClassVar[bool] = True

    def __init__(
        self,
        site: Site,
        parts: Mapping[str, int],
        ties: Collection[str],
        budget: Budget,
        measures: bool,
    ) -> None:
        super().__init__(site, values=budget.values, indices=budget.indices)
        self.parts = dict(parts)
        self.counted = {name: offset for name, offset in parts.items() if name not in ties}
        self.budget = budget
        self.measures = measures

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the host's parameters that have trained scalars, or may have."""
        return tuple(self.parts)

    def ready(self) -> None:
        """Read which scalars are chosen; one delta does it for all."""
        if 0 in self.counted.values():
            self.budget.read(self.t["indices"])

    def effective(self, t: Tensors, own: Tensors, training: bool) -> Tensors:
        """The parameters with the differences added; gradients go to the differences alone."""
        if not self.budget.cuts:
            self.budget.read(t["indices"])
        found: dict[str, Tensor] = {}
        for name, offset in self.parts.items():
            start, stop = self.budget.cuts[offset]
            if start < stop:
                flat = own[name].detach().flatten()
                at = (t["indices"][start:stop].long() - offset).to(flat.device)
                new = (flat[at] + t["values"][start:stop].to(flat.device)).to(flat.dtype)
                found[name] = flat.scatter(0, at, new).view_as(own[name])
        if not self.budget.chosen and t["values"].requires_grad and torch.is_grad_enabled():
            raise AdapterError(
                "the scalars to train are not chosen yet; call esp.calibrate(model, name, batches) "
                "with a few batches of training data first"
                if self.measures
                else "the scalars to train are to be given, and none were: load an adapter that "
                "has them, or choose another mask"
            )
        return found

    def calibrate(self, squares: Tensors) -> None:
        """Offer the Fisher information of each parameter (…); the highest T of all are chosen."""
        if self.t["values"].count_nonzero():
            raise AdapterError(
                f"the scalars of {self.site.path} were trained already; choosing others now would "
                "lose what they learned. Attach a new adapter and calibrate that"
            )
        for name, offset in self.counted.items():
            self.budget.offer(offset, squares[name].flatten(), self.t["indices"])

    def changed(self, host: nn.Module) -> tuple[int, int | None]:
        """The chosen scalars of this module, by a change of any rank."""
        if not self.budget.cuts:
            self.budget.read(self.t["indices"])
        cuts = (self.budget.cuts[offset] for offset in self.counted.values())
        return sum(stop - start for start, stop in cuts), None


def highest(scores: Iterable[Tensor], count: int) -> Tensor:
    """Places (T,), ascending, of the highest of all scores, tensors laid end to end."""
    best, offset = None, 0
    for score in scores:
        best = _higher(best, hosts.whole(score).flatten(), offset, count)
        offset += score.numel()
    assert best is not None
    return best[1].sort().values


def _higher(
    best: tuple[Tensor, Tensor] | None, score: Tensor, offset: int, count: int
) -> tuple[Tensor, Tensor]:
    """The highest scores so far and their places; memory for T and one tensor, not for all."""
    found = score.topk(min(count, len(score)))
    values, places = found.values, found.indices + offset
    if best is None:
        return values, places
    values = torch.cat((best[0], values.to(best[0].device)))
    places = torch.cat((best[1], places.to(best[1].device)))
    kept = values.topk(min(count, len(values)))
    return kept.values, places[kept.indices]


def _none_yet(indices: Tensor) -> None:
    """Before the row's beginning: in no tensor."""
    indices.fill_(-1)


def budget_of(share: float, sizes: Iterable[int]) -> int:
    """T: the share of all scalars, at least one."""
    return max(1, math.floor(share * sum(sizes) + 0.5))
