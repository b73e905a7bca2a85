"""Learned vectors that are added to what leaves a linear host: biases where there are none."""

from __future__ import annotations

from torch import Tensor, nn

from espalier.deltas import Delta, Tensors, Trained
from espalier.places import Site


class Shift(Delta):
    """y + b on a linear host's output, or on the rows of one role of it; b (D_out) starts at 0."""

    def __init__(self, site: Site) -> None:
        super().__init__(site, shift=Trained((site.n_out,)))

    def after(self, t: Tensors, x: Tensor, y: Tensor, training: bool) -> Tensor:
        """The shifted output: y (…, D_out)."""
        return y + t["shift"]

    def fold(self, t: Tensors, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight as it was, and c + b, or b where the host had no bias."""
        return w, t["shift"] if b is None else b + t["shift"]

    def changed(self, host: nn.Module) -> tuple[int, int | None]:
        """The bias; no weight changes."""
        return self.site.n_out, 0
