"""What one training step does, counted instead of timed: the same on every machine, to the bit.

Kernels, GEMMs, FLOPs and bytes are counted as `espalier plan` does; bytes moved are those of all
kernels that are no GEMMs. Bytes saved are the storages that autograd keeps between forward and
backward, each once, parameters left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.planning.work import GEMMS, Work


@dataclass(slots=True)
class Counts(Work):
    """One step's work, and the bytes that it saves for backward."""

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
        self.counts.see(func, args, kwargs, out)
        return out


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
    made = recorder.counts
    counts = Counts(len(recorder.made), made.gemms, made.flops)

    def again() -> None:
        for one in recorder.made:
            one()

    return again, counts
