"""Tensors that can be made again from others which are kept anyway.

A function that makes such a tensor leaves a note on it; whoever would keep the tensor for backward
may keep the note's parts instead. The note says nothing about a tensor that another was made from,
and nothing more of one that was written to afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
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


def in_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """X in another type, cast once for all that read it."""
    if x.dtype == dtype:
        return x
    if x.is_inference() or x.is_leaf:  # a leaf's graph holds the leaf: it would never be freed
        return x.to(dtype)
    stamp = dtype, x._version, torch.is_grad_enabled()
    found = getattr(x, "_espalier_cast", None)
    if found is None or found[0] != stamp:
        cast, source = x.to(dtype), made(x)
        if source is not None:
            cast = note(cast, *source.parts, again=partial(_again, source, dtype))
        found = x._espalier_cast = stamp, cast  # type: ignore[attr-defined]
    return found[1]


def _again(source: Made, dtype: torch.dtype, parts: Sequence[Tensor]) -> Tensor:
    return source.again(parts).to(dtype)
