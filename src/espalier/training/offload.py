"""Activations kept outside the GPU between forward and backward.

    forward   a tensor that autograd saves goes to pinned memory of the host, beside the compute
    backward  it comes back when its operation asks for it

Parameters, small tensors and what lies outside the GPU stay where they are; a tensor saved by
several operations (the input of q, k and v) is moved once. With gradient checkpointing it is the
blocks' inputs that move, which are all that is kept then.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from espalier.errors import SettingError
from espalier.wording import setting

SMALLEST = 2**16
"""Numbers of the smallest tensor that is moved."""


class Store(Protocol):
    """Where tensors wait for the backward pass."""

    def takes(self, tensor: Tensor) -> bool:
        """Whether a saved tensor is to be moved."""
        ...

    def put(self, tensor: Tensor) -> Any:
        """Move a tensor away; what comes back stands for it."""
        ...

    def get(self, kept: Any) -> Tensor:
        """The tensor again, where it was."""
        ...


class Pinned:
    """The host's pinned memory, filled by a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.side = device, torch.cuda.Stream(device)

    def takes(self, tensor: Tensor) -> bool:
        """Tensors on the GPU."""
        return tensor.is_cuda

    def put(self, tensor: Tensor) -> Tensor:
        """A copy in pinned memory, made while the GPU goes on computing."""
        kept = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            kept.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.side)
        return kept

    def get(self, kept: Tensor) -> Tensor:
        """A copy on the GPU, after whatever the side stream still has to write."""
        torch.cuda.current_stream(self.device).wait_stream(self.side)
        return kept.to(self.device, non_blocking=True)


class _Moved:
    """One tensor that was moved, for all operations that saved it."""

    __slots__ = ("__weakref__", "kept", "source")

    def __init__(self, kept: Any, source: StorageWeakRef) -> None:
        self.kept, self.source = kept, source


@contextlib.contextmanager
def offloaded(model: nn.Module, store: Store | None) -> Iterator[None]:
    """Passes within it keep what autograd saves in the store; None: as ever.

    Args:
        model: Its parameters and buffers are never moved.
        store: Where to.
    """
    if store is None:
        yield
        return
    own = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())
    }
    moved: weakref.WeakValueDictionary[tuple[Any, ...], _Moved] = weakref.WeakValueDictionary()

    def pack(tensor: Tensor) -> Tensor | _Moved:
        storage = tensor.untyped_storage()
        if tensor.numel() < SMALLEST or storage.data_ptr() in own or not store.takes(tensor):
            return tensor
        where = (storage.data_ptr(), tensor.storage_offset(), tensor.dtype, tensor._version)
        key = (*where, tuple(tensor.shape), tensor.stride())
        found = moved.get(key)
        if found is None or found.source.expired():  # its address may belong to another by now
            found = _Moved(store.put(tensor), StorageWeakRef(storage))
            moved[key] = found
        return found

    def unpack(kept: Tensor | _Moved) -> Tensor:
        return store.get(kept.kept) if isinstance(kept, _Moved) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def store_for(asked: str, device: torch.device) -> Store | None:
    """The store of the setting `offload`.

    Raises:
        SettingError: The run computes on a CPU, whose memory is the only one there is.
    """
    if asked == "none":
        return None
    if device.type != "cuda":
        raise SettingError(
            f"{setting('offload', asked)} moves activations from a GPU to the host's memory, and "
            f"this run computes on {device.type}. {setting('checkpointing', True)} keeps fewer of "
            "them."
        )
    return Pinned(device)
