"""A named recipe attached to a model: all its trained numbers in a few flat buffers.

The optimiser, saving, loading and moving touch a flat tensor; each delta sees views of it. The
views come from one autograd function whose backward lays their gradients side by side, so that a
backward pass fills one gradient per buffer however many sites there are, and nothing is rebuilt
from step to step. Matrices and vectors have separate buffers: weight decay is for matrices only;
so have numbers with a learning rate of their own, and those that are kept but never trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from espalier.deltas import Delta, Kept, Regime, Trained
from espalier.errors import AdapterError
from espalier.recipes import Recipe


@dataclass(slots=True, eq=False)
class Slot:
    """Where one trained tensor lies in its buffer.

    It knows no delta: deltas hold views, whose graph holds slots, and the garbage collector frees
    no cycle that leads through a graph.
    """

    label: str  # unique within the adapter, the tensor's name in files
    shape: tuple[int, ...]
    start: int
    stop: int

    def of(self, flat: Tensor) -> Tensor:
        """This slot's part of a flat tensor, in its shape."""
        return flat[self.start : self.stop].view(self.shape)


def form(kind: str, dtype: torch.dtype) -> torch.dtype:
    """The type of a kind of buffer: that of the trained numbers, or one of whole numbers."""
    return {"indices": torch.int32, "indices_wide": torch.int64}.get(kind, dtype)


def parts(flat: Tensor, slots: Iterable[Slot]) -> tuple[Tensor, ...]:
    """Every slot's part of a flat tensor, in its shape; one call for each, where `of` takes two."""
    at = flat.storage_offset()
    return tuple([flat.as_strided(s.shape, _strides(s.shape), at + s.start) for s in slots])


@lru_cache(maxsize=1024)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


class _Views(torch.autograd.Function):
    """Flat buffer (N,) → one view per slot; their gradients come back as one flat tensor.

    The outputs share the buffer's memory without being autograd's views of it: an optimiser may
    change the buffer in place and they stay valid, graph and all. Nothing is saved for backward,
    so the same node serves every backward pass. With a `dtype` they are views of a cast copy.
    """

    @staticmethod
    def forward(
        ctx: Any, flat: Tensor, slots: Sequence[Slot], dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.slots, ctx.dtype = slots, flat.dtype
        return parts(flat.data.to(dtype), slots)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        pairs = [(s, g) for s, g in zip(ctx.slots, grads, strict=True) if g is not None]
        if not pairs:
            return None, None, None
        make = torch.empty if len(pairs) == len(ctx.slots) else torch.zeros
        flat = make(ctx.slots[-1].stop, dtype=ctx.dtype, device=pairs[0][1].device)
        torch._foreach_copy_([slot.of(flat) for slot, _ in pairs], [grad for _, grad in pairs])
        return flat, None, None


class Adapter(nn.Module):
    """One named recipe's deltas and their numbers.

    Args:
        name: The name a person gave; any text.
        recipe: What the deltas were built from.
        deltas: (label, delta) in the order in which they act; labels are unique.
        head: Paths of the task head's modules that are trained and saved with it.
        device: Where the buffers lie.
        dtype: Their type; fp32 unless asked otherwise.
        fresh: Start the numbers as the methods say; False starts them at zero, None leaves what
            was in memory to a caller that fills all of it.
    """

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        deltas: Iterable[tuple[str, Delta]],
        head: tuple[str, ...],
        device: torch.device,
        dtype: torch.dtype,
        fresh: bool | None = True,
    ) -> None:
        super().__init__()
        self.name, self.recipe, self.head = name, recipe, head
        self.deltas: list[Delta] = []
        self.labels: list[str] = []  # of the deltas
        self.slots: dict[str, list[Slot]] = {}
        self.users: dict[str, list[tuple[Delta, str]]] = {}  # what uses a slot, by its label
        self.refresh: Callable[[], None] = _nothing  # told when the views were made anew
        self._seen: list[tuple[int, int, bool] | None] = []
        self._cast = False
        self.rates: dict[str, float] = {}  # factor on the learning rate, by kind of buffer
        specs = self._lay_out(deltas)
        regimes = {id(d.regime): d.regime for d in self.deltas if d.regime is not None}
        self.regimes: list[Regime] = list(regimes.values())  # once per method that has one
        self.told = [d for d in self.deltas if type(d).begin is not Delta.begin]
        self.waking = [d for d in self.deltas if type(d).ready is not Delta.ready]
        self.resting = [d for d in self.deltas if type(d).rest is not Delta.rest]
        make = torch.empty if fresh is None else torch.zeros
        for kind, slots in self.slots.items():
            flat = make(slots[-1].stop, dtype=form(kind, dtype), device=device)
            if isinstance(specs[slots[0].label], Kept):
                self.register_buffer(kind, flat)
            else:
                self.register_parameter(kind, nn.Parameter(flat))
            if fresh:
                with torch.no_grad():
                    starts = [(slot, init) for slot in slots if (init := specs[slot.label].init)]
                    views = parts(flat, (slot for slot, _ in starts))
                    for view, (_, init) in zip(views, starts, strict=True):
                        init(view)
        for spec in specs.values():
            spec.init = None  # it may hold on to the base's tensors
        # Its views are made by `sync`, which whoever builds it calls, once it is filled.

    def _lay_out(self, deltas: Iterable[tuple[str, Delta]]) -> dict[str, Trained]:
        known: dict[int, Slot] = {}
        specs: dict[str, Trained] = {}
        for label, delta in deltas:
            self.deltas.append(delta)
            self.labels.append(label)
            for key, spec in delta.trained.items():
                slot = known.get(id(spec))
                if slot is None:
                    kind, shape = spec.kind, spec.shape
                    slots = self.slots.setdefault(kind, [])
                    self.rates[kind] = spec.rate
                    start = slots[-1].stop if slots else 0
                    name = f"{label}/{key}"
                    slot = Slot(name, shape, start, start + math.prod(shape))
                    slots.append(slot)
                    known[id(spec)] = slot
                    specs[name] = spec
                self.users.setdefault(slot.label, []).append((delta, key))
        self.slots = dict(sorted(self.slots.items()))
        return specs

    @property
    def flat(self) -> dict[str, nn.Parameter]:
        """The flat buffers by kind; every trained number of the adapter is in one of them."""
        return {kind: flat for kind, flat in self._parameters.items() if flat is not None}

    @property
    def runs(self) -> dict[str, Tensor]:
        """All flat buffers by kind, also those that are kept and never trained."""
        kept = {kind: flat for kind, flat in self._buffers.items() if flat is not None}
        return {**self.flat, **kept}

    def sync(self) -> None:
        """Make the deltas' views anew if a buffer was moved, replaced, frozen or thawed."""
        seen = [_stamp(p) for p in self._parameters.values()]
        if self._buffers:
            seen += [_stamp(b) for b in self._buffers.values()]
        if seen == self._seen:
            return
        runs = self.runs
        if cut := next((kind for kind, flat in runs.items() if hasattr(flat, "full_tensor")), None):
            raise AdapterError(
                f"the {cut} of adapter {self.name!r} were cut into shards; every process holds an "
                "adapter whole. Shard the base with esp.shard(model), or leave the adapters out: "
                "fully_shard(model, ignored_params=set(esp.parameters(model)))"
            )
        with torch.inference_mode(False), torch.enable_grad():
            for kind, flat in runs.items():
                for delta, key, view in self._views(kind, flat, flat.dtype):
                    delta.t[key] = view
        self._seen = seen
        self.refresh()

    def cast(self, dtype: torch.dtype | None) -> None:
        """Give the deltas all numbers in another type too, cast at once; None takes them away."""
        if dtype is None:
            if self._cast:
                self._cast = False
                for delta in self.deltas:
                    delta.cast = {}
            return
        for kind, flat in self.flat.items():
            if flat.dtype != dtype:
                self._cast = True
                for delta, key, view in self._views(kind, flat, dtype):
                    delta.cast[key] = view

    def _views(
        self, kind: str, flat: Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[Delta, str, Tensor]]:
        """Each delta and key that uses a part of a buffer, with that part in a type."""
        slots = self.slots[kind]
        if flat.requires_grad:
            views = _Views.apply(flat, slots, dtype)
        else:
            views = parts(flat.data.to(dtype), slots)
        for slot, view in zip(slots, views, strict=True):
            for delta, key in self.users[slot.label]:
                yield delta, key, view

    @property
    def built(self) -> dict[int, list[Delta]]:
        """The deltas by the place, in the recipe, of the method that built them; no head's."""
        found: dict[int, list[Delta]] = {}
        for label, delta in zip(self.labels, self.deltas, strict=True):
            index, _, _ = label.partition("/")
            if index != "head":
                found.setdefault(int(index), []).append(delta)
        return found

    def show_gradients(self, show: bool) -> None:
        """Give every delta with a regime views of its gradients (zeros where none), or take them.

        They can be read, and where a buffer has gradients, changed.
        """
        for kind, flat in self.flat.items() if show else ():
            grad = torch.zeros_like(flat) if flat.grad is None else flat.grad
            for slot in self.slots[kind]:
                for delta, key in self.users[slot.label]:
                    if delta.regime is not None:
                        delta.g[key] = slot.of(grad)
        for delta in () if show else self.deltas:
            delta.g = {}

    def named(self) -> Iterable[tuple[str, Tensor]]:
        """(label, numbers) of every slot, detached, sharing memory with the buffers."""
        for kind, flat in self.runs.items():
            for slot in self.slots[kind]:
                yield slot.label, slot.of(flat.detach())

    def dead(self) -> list[str]:
        """Labels of the deltas none of whose numbers got a gradient other than zero.

        Those that say so themselves (`idle`) are passed over.
        """
        alive: set[int] = set()
        for kind, flat in self.flat.items():
            if flat.grad is not None:
                for slot in self.slots[kind]:
                    if slot.of(flat.grad).count_nonzero():
                        alive.update(id(delta) for delta, _ in self.users[slot.label])
        dead = {
            slot.label.rpartition("/")[0]
            for kind in self.flat
            for slot in self.slots[kind]
            if not any(id(delta) in alive or delta.idle for delta, _ in self.users[slot.label])
        }
        return sorted(dead)

    def _apply(self, fn: Any, recurse: bool = True) -> Adapter:
        super()._apply(fn, recurse)
        self.sync()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        from copy import deepcopy

        copy = self.__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update({k: deepcopy(v, memo) for k, v in self.__dict__.items()})
        copy._seen = []  # its graft, or its first forward, makes the views
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": []}  # a restored adapter makes its views on first use


def _stamp(flat: Tensor | None) -> tuple[int, int, bool] | None:
    """What changes when a buffer is moved, replaced, frozen or thawed."""
    return None if flat is None else (id(flat), flat.data_ptr(), flat.requires_grad)


def _nothing() -> None:
    """What `refresh` does before the adapter stands in a model."""
