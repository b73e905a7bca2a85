"""Tensors that can be made again from others which are kept anyway.

A function that makes such a tensor leaves a note on it; whoever would keep the tensor for backward
may keep the note's parts instead. The note says nothing about a tensor that another was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class Made(NamedTuple):
    """How a tensor comes from its parts."""

    parts: tuple[Tensor, ...]
    again: Callable[[Sequence[Tensor]], Tensor]


def made(x: Tensor) -> Made | None:
    """The note on a tensor, if there is one."""
    return getattr(x, "_espalier_made", None)


def note(x: Tensor, *parts: Tensor, again: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
    """Leave a note on x, which is given back."""
    x._espalier_made = Made(parts, again)  # type: ignore[attr-defined]
    return x
