"""Liger's fused kernels for a plain frozen head, where a CUDA device and the package are there.

    pip install liger-kernel

Never run here, for want of a GPU; our own chunks (loss.py) are what they are measured against.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from torch import Tensor


@lru_cache
def _there() -> bool:
    return find_spec("liger_kernel") is not None


def suits(weight: tuple[Tensor, Tensor | None] | None, hidden: Tensor) -> bool:
    """Whether Liger can take the loss: the head is a plain product in the states' own type."""
    if weight is None or not hidden.is_cuda or not len(hidden) or not _there():
        return False
    return weight[0].dtype == hidden.dtype and hidden.requires_grad


def chunked_sum(
    hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, smoothing: float
) -> Tensor:
    """The summed cross-entropy of h Wᵀ + c: hidden (N, D), labels (N,), W (V, D), c (V,)."""
    from liger_kernel.transformers import (  # type: ignore[import-not-found]
        LigerFusedLinearCrossEntropyLoss,
    )

    loss: Any = LigerFusedLinearCrossEntropyLoss(reduction="sum", label_smoothing=smoothing)
    return loss(weight, hidden, labels, bias)
