"""What the matrix library of a CPU keeps for itself.

MKL copies panels of both factors of an fp32 product into buffers of its own, one per thread, and
keeps each buffer for the life of the process: a product that fits in one it has takes that, a
larger one gets a new one beside it. The sizes are those that were measured over shapes and numbers
of threads (`docs/planning.md`). oneDNN, which multiplies bf16, reads the factors where they lie.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
DEPTH = 384  # terms of the sums in a panel, at most
OUT, BESIDE = 10_000, 400  # columns of the result in a panel, at most; rows of it beside them
FEW = 400  # rows: so few are multiplied where they lie, unless threads share them out
_SECOND = {aten.mm: 1, aten.addmm: 2, aten.addmm_: 2}  # where the second factor stands


class Panels:
    """The buffers that products have left, as they come.

    Args:
        threads: How many the products are computed with.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.bytes = 0
        self._largest = 0

    def see(self, packet: Any, args: tuple[Any, ...]) -> None:
        """An operation, which may be a product."""
        at = _SECOND.get(packet)
        if at is None:
            return
        left, right = args[at - 1], args[at]
        if left.dtype == torch.float32 and left.device.type == "cpu":
            self.take(left, right)

    def take(self, left: Tensor, right: Tensor) -> None:
        """A product of left (N, K) and right (K, M)."""
        rows, (inner, columns) = left.shape[0], right.shape
        if self.threads == 1 and rows <= FEW:
            return
        wide = min(-(-columns // self.threads), OUT)
        size = self.threads * left.element_size() * min(inner, DEPTH) * (wide + BESIDE)
        if size > self._largest:
            self.bytes += size
            self._largest = size
