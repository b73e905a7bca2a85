"""What a piece of work holds in memory while it runs, and what it computes and moves.

A dispatch mode sees every operation under it, on real tensors as on fake ones, which have shapes
and no memory: so a step of a model of any size is counted where nothing is allocated. Each storage
is noted once, with the operation that made it and the one after which it was gone. What a kernel
allocates within itself is not seen, except by those that are named here and in `panels`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from espalier.planning.panels import Panels

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
        flops: Floating-point operations of matrix products and attention, a multiply-add as two.
        moved: Bytes that all operations read and wrote.
        kernels: Operations that compute something.
        panels: What the matrix library has kept.
    """

    held: list[Held] = field(default_factory=list)
    length: int = 0
    extra: dict[int, int] = field(default_factory=dict)
    marks: dict[str, int] = field(default_factory=dict)
    flops: int = 0
    moved: int = 0
    kernels: int = 0
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
        for part, tensors in standing.items():
            for tensor in tensors:
                self._note(tensor, part)

    def mark(self, name: str) -> None:
        """Note where the work is."""
        self.course.marks[name] = self.course.length

    def call(self, tensors: Iterable[Tensor | None], part: str) -> None:
        """Say what tensors made under this mode are."""
        for tensor in tensors:
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
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in made:
            self._note(tensor, self._part(tensor))
        if not func.is_view:
            self._work(func, args, kwargs, out, made)
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

    def _work(self, func: Any, args: Any, kwargs: Any, out: Any, made: list[Tensor]) -> None:
        course, packet = self.course, func.overloadpacket
        if packet in _IDLE:
            return
        course.kernels += 1
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        read = made if packet in _PICKS else given
        course.moved += touched(read) + touched(made)
        course.panels.see(packet, args)
        if packet in flop_registry:
            course.flops += flop_registry[packet](*args, **kwargs, out_val=out)
            return
        count = _OTHERS.get(func.name().partition(".")[0])
        if count is not None:
            flops, inner = count(*args)
            course.flops += flops
            if inner:
                course.extra[course.length] = inner


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


# Only allocate, only relabel, or only hand a number to Python.
_IDLE = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
    aten._unsafe_view, aten.lift_fresh, aten._local_scalar_dense, aten.detach,
}  # fmt: skip
# Read no more of their table than they write.
_PICKS = {aten.embedding, aten.gather, aten.index_select, aten.nll_loss_forward}


def touched(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; what is only repeated by a stride of zero is touched once."""
    total = 0
    for tensor in tensors:
        size = tensor.element_size()
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            size *= length if stride else 1
        total += size
    return total


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[int, int]:
    return sdpa_flop_count(q.shape, k.shape, v.shape), 0


def _attention_back(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[int, int]:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape), 0


def _four_bits(x: Tensor, packed: Tensor, shape: Any, *_: Any) -> tuple[int, int]:
    """A product with a 4-bit weight, which is expanded inside, its scales first."""
    count = math.prod(shape)
    return 2 * x.numel() * shape[0], count * x.element_size() + 4 * (count // 64)


# Operations that the counter of FLOPs does not know, and what they take within themselves.
_OTHERS: dict[str, Callable[..., tuple[int, int]]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_back,
    "bitsandbytes::gemm_4bit": _four_bits,
}
