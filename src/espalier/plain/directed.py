"""DoRA's change of a weight: direction by a low-rank change, length by a vector of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.deltas import Delta, Product, Tensors, Trained
from espalier.places import Site
from espalier.plain.lowrank import dropped, factors


class Directed(Delta):
    """c + (m / ρ) ⊙ (x Wᵀ + s · x Aᵀ Bᵀ), with ρ the row norms of W + s·B·A, taken as constants.

    m = ‖W‖ + μ and μ (D_out,) is what is trained: it starts at zero, so that a fresh one is exact
    in bf16 too, and weight decay, were it applied, would pull to the base and not to zero. The
    norms come from products with the factors; no matrix of the weight's size is made.

    Args:
        site: Where.
        scale: s.
        dropout: Dropout on what is added to the plain output, in training only.
        numbers: a, b and m; a0 and b0 where the factors start within the weight.
    """

    reads_host = True
    stretches = True

    def __init__(self, site: Site, scale: float, dropout: float = 0.0, **numbers: Trained) -> None:
        super().__init__(site, **numbers)
        self.scale = scale
        self.dropout = dropout

    def after(self, t: Tensors, x: Tensor, y: Tensor, training: bool) -> Tensor:
        """The output with the change: x (…, D_in), y (…, D_out)."""
        a, b = factors(t)
        mine = dropped(x, self.dropout, training)
        low = F.linear(F.linear(mine, a) * self.scale, b)
        product = y - t["bias"] if "bias" in t else y
        if mine is not x:
            product = product + F.linear(mine - x, t["weight"])
        # Written as what is added, so that bf16 rounds the change and not the sum.
        return y + low + self.stretch(t).to(y.dtype) * (product + low)

    def product(self, t: Tensors) -> Product:
        """Its factors, and how much longer each row gets."""
        return Product(*factors(t), self.scale, self.dropout, self.stretch(t))

    def stretch(self, t: Tensors) -> Tensor:
        """How much longer each row gets, m / ρ − 1 (D_out,), at least fp32."""
        w = t["weight"]
        wide = torch.promote_types(w.dtype, torch.float32)
        with torch.no_grad():
            a, b = factors(t)
            length = torch.linalg.vector_norm(w, dim=1, dtype=wide)
            # ρ² − ‖W‖² = 2s ⟨W, BA⟩ + s² ‖BA‖², row by row
            both = torch.addmm(F.linear(w, a), b, a @ a.T, beta=2 * self.scale, alpha=self.scale**2)
            more = (both.to(wide) * b).sum(1)
            tiny = torch.finfo(wide).tiny  # a row of zeros has no direction: it stays zero
            rho = torch.addcmul(more, length, length).clamp_min_(tiny).sqrt_()
            fall = more / (rho + length)  # ρ − ‖W‖ without cancellation
        return (t["m"].to(wide) - fall) / rho

    def fold(self, t: Tensors, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows of W + s B A at their new length; what earlier deltas added to c is stretched."""
        down, up = factors(t)
        stretch = self.stretch(t)
        w = w.addmm(up, down, alpha=self.scale)
        w = w + stretch.unsqueeze(1) * w
        if b is not None and "bias" in t:
            b = b + stretch * (b - t["bias"])
        return w, b

    def plain(self, t: Tensors) -> Tensors:
        """A, B and m alone."""
        return {**dict(zip("ab", factors(t), strict=True)), "m": t["m"]}

    def changed(self, host: nn.Module) -> tuple[int, int | None]:
        """The whole slice of the weight; stretched rows bound no rank."""
        return self.site.n_in * self.site.n_out, None
