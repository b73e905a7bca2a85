"""Low-rank changes of a weight: LoRA's family ends here. B batch, D width, R rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from espalier.deltas import Delta, Tensors, Trained
from espalier.places import Site

if TYPE_CHECKING:
    from espalier.places import Conv


def _drop(x: Tensor, share: float, training: bool) -> Tensor:
    return F.dropout(x, share) if share and training else x


class LowRank(Delta):
    """y + s · x Aᵀ Bᵀ on a linear host; A (R, D_in), B (D_out, R)."""

    def __init__(self, site: Site, a: Trained, b: Trained, scale: float, dropout: float) -> None:
        super().__init__(site, a=a, b=b)
        self.scale = scale
        self.dropout = dropout

    def after(self, t: Tensors, x: Tensor, y: Tensor, training: bool) -> Tensor:
        """The output with the low-rank change: x (…, D_in), y (…, D_out)."""
        low = F.linear(_drop(x, self.dropout, training), t["a"])  # (…, R)
        return y + F.linear(low * self.scale, t["b"])

    def fold(self, t: Tensors, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s B A, with W (D_out, D_in)."""
        return w.addmm(t["b"], t["a"], alpha=self.scale), b

    def changed(self, host: nn.Module) -> tuple[int, int | None]:
        """The whole slice of the weight, by a change of rank at most R."""
        return self.site.n_in * self.site.n_out, self.trained["a"].shape[0]


class LowRankConv(Delta):
    """y + s · B ∗ (A ∗ x) on a 2-d convolution; A (R, C_in, kh, kw), B (C_out, R, 1, 1)."""

    def __init__(self, site: Site, a: Trained, b: Trained, scale: float, dropout: float) -> None:
        super().__init__(site, a=a, b=b)
        self.scale = scale
        self.dropout = dropout
        assert site.conv is not None
        self.conv: Conv = site.conv

    def after(self, t: Tensors, x: Tensor, y: Tensor, training: bool) -> Tensor:
        """The output with the change: x (B, C_in, H, W), y (B, C_out, H', W')."""
        x = _drop(x, self.dropout, training)
        conv, padding = self.conv, self.conv.padding
        if conv.padding_mode != "zeros":
            assert isinstance(conv.padding, tuple)  # LoRA refuses the rest
            height, width = conv.padding
            x = F.pad(x, (width, width, height, height), mode=conv.padding_mode)
            padding = 0
        low = F.conv2d(x, t["a"], None, conv.stride, padding, conv.dilation)
        return y + F.conv2d(low * self.scale, t["b"])

    def fold(self, t: Tensors, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s B A as a kernel (C_out, C_in, kh, kw)."""
        change = t["b"].flatten(1) @ t["a"].flatten(1)
        return w + self.scale * change.view_as(w), b

    def changed(self, host: nn.Module) -> tuple[int, int | None]:
        """The whole kernel, by a change of rank at most R."""
        height, width = self.conv.kernel
        return self.site.n_in * self.site.n_out * height * width, self.trained["a"].shape[0]


class LowRankEmbedding(Delta):
    """y + s · A[:, ids]ᵀ Bᵀ on an embedding; A (R, V), B (D, R)."""

    def __init__(self, site: Site, a: Trained, b: Trained, scale: float) -> None:
        super().__init__(site, a=a, b=b)
        self.scale = scale

    def after(self, t: Tensors, x: Tensor, y: Tensor, training: bool) -> Tensor:
        """The embedded ids with the change: x (…) of ids, y (…, D)."""
        low = F.embedding(x, t["a"].T)  # (…, R)
        return y + F.linear(low * self.scale, t["b"])

    def fold(self, t: Tensors, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """E + s (B A)ᵀ, with E (V, D)."""
        return w.addmm(t["a"].T, t["b"].T, alpha=self.scale), b

    def changed(self, host: nn.Module) -> tuple[int, int | None]:
        """The whole table, by a change of rank at most R."""
        return self.site.n_in * self.site.n_out, self.trained["a"].shape[0]
