"""Low-rank changes of a weight: LoRA's family ends here. B batch, D width, R rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.deltas import Delta, Product, Tensors, Trained
from espalier.places import Site

if TYPE_CHECKING:
    from espalier.places import Conv


def factors(t: Tensors) -> tuple[Tensor, Tensor]:
    """The A and B whose product is the change.

    Factors that start within the weight itself (PiSSA) are kept as a0 and b0, and a and b are what
    was learned on top. (B₀ + b)(A₀ + a) − B₀A₀ = (B₀ + b)·a + b·A₀ is a change of rank 2R that is
    exactly zero when fresh and in which nothing large cancels.
    """
    if "a0" not in t:
        return t["a"], t["b"]
    return torch.cat((t["a"], t["a0"])), torch.cat((t["b0"] + t["b"], t["b"]), dim=1)


def dropped(x: Tensor, share: float, training: bool) -> Tensor:
    """The branch's input after dropout; x itself where there is none."""
    return F.dropout(x, share) if share and training else x


class LowRank(Delta):
    """y + s · x Aᵀ Bᵀ on a linear host; A (R, D_in), B (D_out, R).

    Args:
        site: Where.
        scale: s.
        dropout: Dropout on the branch's input, in training only.
        numbers: a and b, and a0 and b0 where they start within the weight (see `factors`).
    """

    def __init__(self, site: Site, scale: float, dropout: float = 0.0, **numbers: Trained) -> None:
        super().__init__(site, **numbers)
        self.scale = scale
        self.dropout = dropout

    def after(self, t: Tensors, x: Tensor, y: Tensor, training: bool) -> Tensor:
        """The output with the low-rank change: x (…, D_in), y (…, D_out)."""
        a, b = factors(t)
        low = F.linear(dropped(x, self.dropout, training), a)  # (…, R)
        return y + F.linear(low * self.scale, b)

    def product(self, t: Tensors) -> Product:
        """Its factors."""
        return Product(*factors(t), self.scale, self.dropout)

    def fold(self, t: Tensors, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s B A, with W (D_out, D_in)."""
        down, up = factors(t)
        return w.addmm(up, down, alpha=self.scale), b

    def plain(self, t: Tensors) -> Tensors:
        """A and B alone."""
        return dict(zip("ab", factors(t), strict=True))

    def changed(self, host: nn.Module) -> tuple[int, int | None]:
        """The whole slice of the weight, by a change of rank at most R."""
        return self.site.n_in * self.site.n_out, rank(self)


class LowRankConv(Delta):
    """y + s · B ∗ (A ∗ x) on a 2-d convolution; A (R, C_in, kh, kw), B (C_out, R, 1, 1).

    Arguments as for `LowRank`.
    """

    def __init__(self, site: Site, scale: float, dropout: float = 0.0, **numbers: Trained) -> None:
        super().__init__(site, **numbers)
        self.scale = scale
        self.dropout = dropout
        assert site.conv is not None
        self.conv: Conv = site.conv

    def after(self, t: Tensors, x: Tensor, y: Tensor, training: bool) -> Tensor:
        """The output with the change: x (B, C_in, H, W), y (B, C_out, H', W')."""
        a, b = factors(t)
        x = dropped(x, self.dropout, training)
        conv, padding = self.conv, self.conv.padding
        if conv.padding_mode != "zeros":
            assert isinstance(conv.padding, tuple)  # LoRA refuses the rest
            height, width = conv.padding
            x = F.pad(x, (width, width, height, height), mode=conv.padding_mode)
            padding = 0
        low = F.conv2d(x, a, None, conv.stride, padding, conv.dilation)
        return y + F.conv2d(low * self.scale, b)

    def fold(self, t: Tensors, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s B A as a kernel (C_out, C_in, kh, kw)."""
        down, up = factors(t)
        change = up.flatten(1) @ down.flatten(1)
        return w + self.scale * change.view_as(w), b

    def plain(self, t: Tensors) -> Tensors:
        """A and B alone."""
        return dict(zip("ab", factors(t), strict=True))

    def changed(self, host: nn.Module) -> tuple[int, int | None]:
        """The whole kernel, by a change of rank at most R."""
        height, width = self.conv.kernel
        return self.site.n_in * self.site.n_out * height * width, rank(self)


class LowRankEmbedding(Delta):
    """y + s · A[:, ids]ᵀ Bᵀ on an embedding; A (R, V), B (D, R).

    `padding` is the id whose row of the table never trains; its column of A does not either.
    """

    def __init__(
        self, site: Site, scale: float, padding: int | None = None, **numbers: Trained
    ) -> None:
        super().__init__(site, **numbers)
        self.scale = scale
        self.padding = padding

    def after(self, t: Tensors, x: Tensor, y: Tensor, training: bool) -> Tensor:
        """The embedded ids with the change: x (…) of ids, y (…, D)."""
        low = F.embedding(x, t["a"].T, self.padding)  # (…, R)
        return y + F.linear(low * self.scale, t["b"])

    def fold(self, t: Tensors, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """E + s (B A)ᵀ, with E (V, D)."""
        return w.addmm(t["a"].T, t["b"].T, alpha=self.scale), b

    def changed(self, host: nn.Module) -> tuple[int, int | None]:
        """The whole table, by a change of rank at most R."""
        return self.site.n_in * self.site.n_out, rank(self)


def rank(delta: Delta) -> int:
    """The rank of a low-rank delta's change, at most."""
    return sum(spec.shape[0] for key, spec in delta.trained.items() if key in ("a", "a0"))


class Unchanged(Delta):
    """A place whose rank is 0: nothing is added and nothing trains."""

    idle = True

    def fold(self, t: Tensors, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as they are."""
        return w, b
