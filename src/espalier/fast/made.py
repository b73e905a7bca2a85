"""Tensors that can be made again from others which are kept anyway.

A function that makes such a tensor leaves a note on it; whoever would keep the tensor for backward
may keep the note's parts instead. The note says nothing about a tensor that another was made from,
and nothing more of one that was written to afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class Made(NamedTuple):
    """How a tensor comes from its parts."""

    parts: tuple[Tensor, ...]
    again: Callable[[Sequence[Tensor]], Tensor]
    version: int  # the tensor's, when the note was left


def made(x: Tensor) -> Made | None:
    """The note on a tensor, if there is one."""
    found: Made | None = getattr(x, "_espalier_made", None)
    return found if found is not None and found.version == x._version else None


def note(x: Tensor, *parts: Tensor, again: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
    """Leave a note on x, which is given back."""
    if not x.is_inference():  # those count no versions, and nobody keeps them for backward
        x._espalier_made = Made(parts, again, x._version)  # type: ignore[attr-defined]
    return x
