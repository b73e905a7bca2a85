"""Learned vectors that multiply what enters or what leaves a linear host."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import init

from espalier.deltas import Delta, Tensors, Trained
from espalier.places import Site


class ScaleOut(Delta):
    """y ⊙ l on a linear host's output; l (D_out) starts as ones."""

    def __init__(self, site: Site) -> None:
        super().__init__(site, scale=Trained((site.n_out,), init.ones_))

    def after(self, t: Tensors, x: Tensor, y: Tensor, training: bool) -> Tensor:
        """The scaled output: y (…, D_out)."""
        return y * t["scale"]

    def fold(self, t: Tensors, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """diag(l) W, with W (D_out, D_in), and l ⊙ c."""
        scale = t["scale"]
        return w * scale.unsqueeze(1), None if b is None else b * scale

    def changed(self, host: nn.Module) -> tuple[int, int | None]:
        """Weight and bias of the site, by a diagonal of full rank."""
        biases = 0 if host._parameters.get("bias") is None else self.site.n_out
        return self.site.n_in * self.site.n_out + biases, None


class ScaleIn(Delta):
    """x ⊙ l on a linear host's input; l (D_in) starts as ones."""

    def __init__(self, site: Site) -> None:
        super().__init__(site, scale_in=Trained((site.n_in,), init.ones_))

    def before(self, t: Tensors, x: Tensor, training: bool) -> Tensor:
        """The scaled input: x (…, D_in)."""
        return x * t["scale_in"]

    def fold(self, t: Tensors, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W diag(l), with W (D_out, D_in); the bias is added later and stays."""
        return w * t["scale_in"], b

    def changed(self, host: nn.Module) -> tuple[int, int | None]:
        """The whole weight, by a diagonal of full rank."""
        return self.site.n_in * self.site.n_out, None
