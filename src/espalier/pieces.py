"""Rows of tensors of a batch, taken out for a group and put together again."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

Live = tuple[tuple[str, float], ...]


class Group(NamedTuple):
    """Rows that are on the same adapters: which, and (name, weight) of the adapters."""

    live: Live
    rows: Tensor


class Pieces:
    """What a group's rows have of tensors of the whole batch; the same tensor gives one piece."""

    def __init__(self, size: int, rows: Tensor) -> None:
        self.size, self.rows = size, rows
        self.known: list[tuple[Tensor, Tensor]] = []

    def of(self, value: Any) -> Any:
        """The group's rows of a tensor, and of the tensors in a tuple, list or dictionary."""
        if isinstance(value, Tensor):
            return self._rows(value)
        if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
            return type(value)(self.of(one) for one in value)
        if type(value) is dict:
            return {key: self.of(one) for key, one in value.items()}
        return value

    def _rows(self, value: Tensor) -> Tensor:
        if value.dim() == 0 or len(value) != self.size:
            return value  # one for all rows, or nothing of rows
        for whole, piece in self.known:
            if whole is value:
                return piece
        piece = value.index_select(0, self.rows.to(value.device))
        self.known.append((value, piece))
        return piece


def written(whole: Tensor, changed: list[tuple[Tensor, Tensor]], size: int) -> Tensor:
    """A tensor of all rows with some of them replaced; the given one stays."""
    own = whole if len(whole) == size else whole.expand(size, *whole.shape[1:])
    own = own.clone()
    for rows, part in changed:
        own.index_copy_(0, rows, part.to(own.dtype).expand(len(rows), *own.shape[1:]))
    return own


def together(parts: list[Tensor], where: list[Tensor], size: int) -> Tensor:
    """The parts of all groups as one tensor, every row in its place."""
    if len(parts) == 1:
        return parts[0]
    place = torch.empty_like(torch.cat(where)).scatter_(
        0, torch.cat(where), torch.arange(size, device=where[0].device)
    )
    return torch.cat(parts).index_select(0, place)
