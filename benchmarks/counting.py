"""What one training step does, counted instead of timed: the same on every machine, to the bit.

Kernels are the ATen operations dispatched that compute something (no views, no bare allocations).
GEMMs are matrix products and convolutions, with their floating-point operations. Bytes moved are
what all other kernels read and write. Bytes saved are the storages that autograd keeps between
forward and backward, each once, parameters left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from espalier.planning.trace import touched

aten = torch.ops.aten
GEMMS = (
    *(aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.baddbmm_),
    *(aten.convolution, aten.convolution_backward),
)
_PLAIN = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}
# Only allocate, only relabel, or only hand a number to Python.
_IDLE = (
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
    aten._unsafe_view, aten.lift_fresh, aten._local_scalar_dense,
)  # fmt: skip
# Read no more of their table than they write.
_PICKS = (aten.embedding, aten.gather, aten.index_select, aten.nll_loss_forward)
# Write no more of their table than they are given.
_PUTS = (aten.scatter_, aten.scatter_add_, aten.index_put_)
# Write whole what they do not read whole.
_FILLS = (aten.nll_loss_backward,)


@dataclass(slots=True)
class Counts:
    """One step's work; bytes are bytes, FLOPs count a multiply-add as two."""

    kernels: int = 0
    gemms: int = 0
    flops: int = 0
    moved: int = 0
    saved: int = 0


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if func.is_view or packet in _IDLE:
            return out
        self.counts.kernels += 1
        if packet in GEMMS:
            self.counts.gemms += 1
            self.counts.flops += flop_registry[_PLAIN.get(packet, packet)](
                *args, **kwargs, out_val=out
            )
            return out
        written = touched(_tensors(out) or _changed(func, args, kwargs))
        if packet in _PICKS:
            read = written
        elif packet in _PUTS:
            read = written = 2 * touched(_tensors(args[2:3]))
        elif packet in _FILLS:
            read = 0
        else:
            read = touched(_tensors((args, kwargs)))
        self.counts.moved += read + written
        return out


def _changed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """What an operation without results writes to (the fused optimiser steps)."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    marked = (a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write)
    return _tensors([given.get(name) for name in marked])


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def count(
    forward: Callable[[], Tensor], finish: Callable[[Tensor], object], own: Iterable[Tensor]
) -> Counts:
    """Counts one step.

    Args:
        forward: Gives the loss.
        finish: Runs backward, the optimiser and the zeroing of gradients.
        own: Parameters and buffers of the model, which are not counted as saved.
    """
    with _Counter() as counter:
        finish(forward())
    counts = counter.counts
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    finish(loss)
    counts.saved = sum(kept.values())
    return counts


class _Recorder(_Counter):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[Callable[[], object]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket in GEMMS:
            self.made.append(functools.partial(func, *map(_stand_in, args), **(kwargs or {})))
        return super().__torch_dispatch__(func, types, args, kwargs)


def _stand_in(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return like.normal_(std=0.02)


def products(step: Callable[[], object]) -> tuple[Callable[[], None], Counts]:
    """What does a step's matrix products again, alone, on numbers of its own; and their counts."""
    with _Recorder() as recorder:
        step()
    counts = Counts(len(recorder.made), recorder.counts.gemms, recorder.counts.flops)

    def again() -> None:
        for one in recorder.made:
            one()

    return again, counts
