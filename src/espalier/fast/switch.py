"""One switch for everything in this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_plain = 0  # how many `plain_paths` are entered


def enabled() -> bool:
    """Whether fast paths may be taken; torch.func's transforms know nothing of their functions."""
    if _plain:
        return False
    if torch.compiler.is_compiling():
        return True
    return torch._C._functorch.peek_interpreter_stack() is None  # type: ignore[attr-defined]


def ordinary(x: Tensor) -> bool:
    """Whether x is torch's own, or a plan's, which has a shape and no memory; not sharded, nested
    or another library's.
    """
    return type(x).__name__ in ("Tensor", "FakeTensor")


@contextmanager
def plain_paths() -> Iterator[None]:
    """Within it every forward pass is the model's own code and the deltas' own ports.

    Example:
        with esp.plain_paths():
            loss = model(**batch).loss
    """
    global _plain
    _plain += 1
    try:
        yield
    finally:
        _plain -= 1
