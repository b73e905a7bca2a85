"""What a piece of work holds in memory while it runs, and what it computes and moves.

A dispatch mode sees every operation under it, on real tensors as on fake ones, which have shapes
and no memory: so a step of a model of any size is counted where nothing is allocated. Each storage
is noted once, with the operation that made it and the one after which it was gone. What a kernel
allocates within itself is not seen, except where `work` and `panels` know it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.planning.panels import Panels
from espalier.planning.work import Work, tensors

aten = torch.ops.aten


@dataclass(slots=True, eq=False)
class Held:
    """One storage: when it came and went, counted in operations, and what it is."""

    bytes: int
    born: int
    part: str
    gone: int | None = None

    def at(self, moment: int) -> bool:
        """Whether it was there while operation number `moment` ran."""
        return self.born <= moment and (self.gone is None or self.gone >= moment)


@dataclass(slots=True)
class Course:
    """What was held over a piece of work, and its cost.

    Attributes:
        held: Every storage.
        length: Operations seen.
        extra: Bytes that operations took within themselves, by their number.
        marks: Numbers of operations that something was noted at.
        work: What was computed and moved.
        panels: What the matrix library has kept.
    """

    held: list[Held] = field(default_factory=list)
    length: int = 0
    extra: dict[int, int] = field(default_factory=dict)
    marks: dict[str, int] = field(default_factory=dict)
    work: Work = field(default_factory=Work)
    panels: Panels = field(default_factory=lambda: Panels(torch.get_num_threads()))

    def line(self) -> list[int]:
        """Bytes held while each operation ran, the state before the first one included."""
        change = [0] * (self.length + 2)
        for one in self.held:
            change[one.born] += one.bytes
            if one.gone is not None:
                change[min(one.gone, self.length) + 1] -= one.bytes
        line = list(accumulate(change))[: self.length + 1]
        for moment, count in self.extra.items():
            line[moment] += count
        return line

    def parts(self, moment: int) -> dict[str, int]:
        """Bytes by part while operation number `moment` ran."""
        found = {"workspace": self.extra.get(moment, 0)}
        for one in self.held:
            if one.at(moment):
                found[one.part] = found.get(one.part, 0) + one.bytes
        return found

    def saved(self) -> int:
        """Bytes that were made in the forward pass and are there when the backward begins."""
        mark = self.marks["backward"]
        return sum(
            one.bytes
            for one in self.held
            if 0 < one.born <= mark and (one.gone is None or one.gone > mark)
        )


class Tracer(TorchDispatchMode):
    """Fills a `Course` with what runs under it.

    Args:
        standing: Tensors that are there before, by part.
        vocabulary: Width of the tensors that count as logits.
        counting: For fake tensors, whose numbers may be asked for: how many of so many labels
            count; all where it does not say.
    """

    def __init__(
        self,
        standing: Mapping[str, Iterable[Tensor]],
        vocabulary: int = 0,
        counting: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.course = Course()
        self.vocabulary = vocabulary
        self.counting = counting
        self._live: dict[int, tuple[Held, weakref.ref[Any]]] = {}
        for part, held in standing.items():
            for tensor in held:
                self._note(tensor, part)

    def mark(self, name: str) -> None:
        """Note where the work is."""
        self.course.marks[name] = self.course.length

    def call(self, made: Iterable[Tensor | None], part: str) -> None:
        """Say what tensors made under this mode are."""
        for tensor in made:
            found = None if tensor is None else self._live.get(tensor.untyped_storage()._cdata)
            if found is not None:
                found[0].part = part

    def rename(self, old: str, new: str) -> None:
        """Say what all that is held now as `old` is."""
        for held, _ in self._live.values():
            if held.part == old:
                held.part = new

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        course = self.course
        course.length += 1
        if self.counting is not None:
            known = _answered(func, args, self.counting)
            if known is not None:
                return known[0]
        out = func(*args, **kwargs)
        for tensor in tensors(out):
            self._note(tensor, self._part(tensor))
        if inner := course.work.see(func, args, kwargs, out):
            course.extra[course.length] = inner
        course.panels.see(func.overloadpacket, args)
        return out

    def _part(self, tensor: Tensor) -> str:
        wide = self.vocabulary and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
        return "logits" if wide else "workspace"

    def _note(self, tensor: Tensor, part: str) -> None:
        if tensor.device.type == "meta":  # a shape that is asked for, with no memory anywhere
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        held = Held(storage.nbytes(), self.course.length, part)
        self.course.held.append(held)
        self._live[key] = held, weakref.ref(storage, partial(self._gone, key))

    def _gone(self, key: int, _: object) -> None:
        found = self._live.pop(key, None)
        if found is not None:
            found[0].gone = self.course.length


def _answered(func: Any, args: tuple[Any, ...], counting: Mapping[int, int]) -> tuple[Any] | None:
    """What numbers would say that fake tensors lack: which labels count, no mask is all ones."""
    if func.overloadpacket is aten.nonzero and args[0].dtype == torch.bool:
        asked = args[0]
        count = counting.get(asked.numel(), asked.numel())
        return (torch.empty(count, asked.dim(), dtype=torch.long, device=asked.device),)
    if func.overloadpacket is aten.equal:
        return (True,)
    if func.overloadpacket is aten._local_scalar_dense:
        kind = args[0].dtype
        return (False,) if kind == torch.bool else (0,) if kind == torch.int64 else None
    return None
