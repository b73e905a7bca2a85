"""Low-rank deltas as other libraries keep them: one pair of matrices for each whole layer.

A slice of a fused layer becomes a change of the whole layer with zero rows elsewhere; several
low-rank deltas on one layer become one of the summed rank. Both are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.deltas import Delta
from espalier.plain.directed import Directed
from espalier.plain.lowrank import LowRank, LowRankConv, LowRankEmbedding

KINDS = (LowRank, LowRankConv, LowRankEmbedding, Directed)


@dataclass(slots=True)
class Low:
    """A change s·B·A of a whole host."""

    a: Tensor
    b: Tensor
    scale: float
    table: bool  # of an embedding

    @property
    def rank(self) -> int:
        """Width of the bottleneck."""
        return self.a.shape[0]


def is_low(delta: Delta) -> bool:
    """Whether a delta is a low-rank change, its rows stretched (DoRA) or not."""
    return isinstance(delta, KINDS)


def low(delta: Delta) -> Low:
    """A low-rank delta in its plain form, as a change of its whole host."""
    assert isinstance(delta, KINDS)
    t = delta.plain({key: view.detach() for key, view in delta.t.items()})
    a, b, rows = t["a"], t["b"], delta.site.rows
    if rows is not None:
        b = rows.place(b.new_zeros(b.shape[1], rows.groups * rows.width), b.T).T
    return Low(a, b, delta.scale, isinstance(delta, LowRankEmbedding))


def joined(parts: list[Low]) -> Low:
    """Several changes of one host as one: ranks add up, scales move into B."""
    if len(parts) == 1:
        return parts[0]
    a = torch.cat([part.a for part in parts])
    b = torch.cat([part.b * part.scale for part in parts], dim=1)
    return Low(a, b, 1.0, parts[0].table)
