"""What operations compute and move, counted one by one as a dispatch mode sees them.

Kernels are the operations that compute something (no views, no bare allocations). GEMMs are matrix
products and convolutions. Bytes moved are what an operation reads and writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

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
class Work:
    """A piece of work; bytes are bytes, FLOPs count a multiply-add as two.

    Attributes:
        kernels: Operations that compute something.
        gemms: Those that are matrix products and convolutions.
        flops: Floating-point operations of GEMMs, attention and 4-bit products.
        moved: Bytes that all but GEMMs read and write.
        fed: Bytes that GEMMs read and write.
    """

    kernels: int = 0
    gemms: int = 0
    flops: int = 0
    moved: int = 0
    fed: int = 0

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
        """Count an operation; returns the bytes that it takes within itself, where known."""
        packet = func.overloadpacket
        if func.is_view or packet in _IDLE:
            return 0
        self.kernels += 1
        written = touched(tensors(out) or _changed(func, args, kwargs))
        if packet in GEMMS:
            self.gemms += 1
            self.flops += flop_registry[_PLAIN.get(packet, packet)](*args, **kwargs, out_val=out)
            self.fed += touched(tensors((args, kwargs))) + written
            return 0
        if packet in _PICKS:
            read = written
        elif packet in _PUTS:
            read = written = 2 * touched(tensors(args[2:3]))
        elif packet in _FILLS:
            read = 0
        else:
            read = touched(tensors((args, kwargs)))
        self.moved += read + written
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
            return 0
        flops, inner = _OTHERS.get(func.name().partition(".")[0], _none)(*args)
        self.flops += flops
        return inner


def touched(found: Iterable[Tensor]) -> int:
    """Bytes of tensors; what is only repeated by a stride of zero is touched once."""
    total = 0
    for tensor in found:
        size = tensor.element_size()
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            size *= length if stride else 1
        total += size
    return total


def tensors(tree: Any) -> list[Tensor]:
    """The tensors among arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _changed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """What an operation without results writes to (the fused optimiser steps)."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    marked = (a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write)
    return tensors([given.get(name) for name in marked])


def _none(*_: Any) -> tuple[int, int]:
    return 0, 0


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[int, int]:
    return sdpa_flop_count(q.shape, k.shape, v.shape), 0


def _attention_back(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[int, int]:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape), 0


def _four_bits(x: Tensor, packed: Tensor, shape: Any, *_: Any) -> tuple[int, int]:
    """A product with a 4-bit weight, which is expanded inside, its scales first."""
    count = math.prod(shape)
    return 2 * x.numel() * shape[0], count * x.element_size() + 4 * (count // 64)


# Operations that torch's counter of FLOPs does not know, and what they take within themselves.
_OTHERS: dict[str, Callable[..., tuple[int, int]]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_back,
    "bitsandbytes::gemm_4bit": _four_bits,
}
