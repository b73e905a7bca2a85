"""Bottlenecks: down, a nonlinearity and up again, added to what a module gives.

D is the width of the text's states, M of the bottleneck; s is the scale of the branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init

from espalier.deltas import Batch, Delta, Tensors, Trained
from espalier.errors import SiteError
from espalier.modules import base_modules
from espalier.places import Site, Sites
from espalier.plain.whole import replacements
from espalier.recipes import check


def _same(x: Tensor) -> Tensor:
    return x


def _gelu_new(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_new,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "linear": _same,
}


def _kaiming(w: Tensor) -> None:
    init.kaiming_uniform_(w, a=math.sqrt(5))


def _small(w: Tensor) -> None:
    init.normal_(w, std=0.02)


def _truncated(w: Tensor) -> None:
    init.trunc_normal_(w, std=0.01, a=-0.02, b=0.02)


# How the two projections start; biases start at zero.
INITS: dict[str, tuple[Callable[[Tensor], object], Callable[[Tensor], object] | None]] = {
    "zero_up": (_kaiming, None),
    "bert": (_small, _small),
    "houlsby": (_truncated, _truncated),
}


@dataclass(frozen=True, slots=True)
class Form:
    """What the bottlenecks of one method have in common.

    `scale` is s, "learned" for one trained number per bottleneck that starts at 1; `dropout` acts
    on the bottleneck.
    """

    nonlinearity: str
    init: str = "zero_up"
    scale: float | str = 1.0
    dropout: float = 0.0

    def numbers(self, n_in: int, width: int, n_out: int) -> dict[str, Trained]:
        """The trained numbers: down (M, D_in), up (D_out, M), their biases, a learned scale."""
        down, up = INITS[self.init]
        return {
            "down": Trained((width, n_in), down),
            "up": Trained((n_out, width), up),
            **self.vectors(width, n_out),
        }

    def vectors(self, width: int, n_out: int) -> dict[str, Trained]:
        """The biases, and the scale where it is learned."""
        found = {"down_bias": Trained((width,)), "up_bias": Trained((n_out,))}
        if self.scale == "learned":
            found["scale"] = Trained((1,), init.ones_)
        return found


def check_form(method: Any, *also: str) -> None:
    """Raise SettingError where a method's settings make no bottleneck.

    Args:
        method: With the settings bottleneck, nonlinearity, dropout and sites.
        also: Words besides the nonlinearities' names that the method understands.
    """
    width, share = method.bottleneck, method.dropout
    fits = width is None or (type(width) is int and width >= 1)
    check(method, "bottleneck", fits, "a whole number of at least 1")
    names = (*also, *NONLINEARITIES)
    check(method, "nonlinearity", method.nonlinearity in names, f"one of {', '.join(names)}")
    fits = isinstance(share, int | float) and 0 <= share < 1
    check(method, "dropout", fits, "at least 0 and below 1")
    check(method, "sites", isinstance(method.sites, str), "a selector such as 'ffn'")


def check_scale(method: Any) -> None:
    """Raise SettingError unless the scale is a number or "learned"."""
    number = isinstance(method.scale, int | float) and not isinstance(method.scale, bool)
    check(method, "scale", number or method.scale == "learned", "a number or 'learned'")


class Bottleneck(Delta):
    """The branch s · (φ(h Downᵀ + c) Upᵀ + e); subclasses say what h is and where it is added."""

    gates = True

    def __init__(self, site: Site, form: Form, **trained: Trained) -> None:
        super().__init__(site, **trained)
        self.form = form

    def maps(self, t: Tensors) -> tuple[Tensor, Tensor]:
        """The projections down (M, D_in) and up (D_out, M)."""
        return t["down"], t["up"]

    def branch(self, t: Tensors, h: Tensor, training: bool) -> Tensor:
        """What is added: h (…, D_in) to (…, D_out)."""
        down, up = self.maps(t)
        low = NONLINEARITIES[self.form.nonlinearity](F.linear(h, down, t["down_bias"]))
        if self.form.dropout and training:
            low = F.dropout(low, self.form.dropout)
        change = F.linear(low, up, t["up_bias"])
        if "scale" in t:
            change = change * t["scale"]
        elif self.form.scale != 1.0:
            change = change * float(self.form.scale)
        return change * t["gate"] if "gate" in t else change


class Depth:
    """How many of the lowest layers a pass leaves out, shared by the deltas of one adapter.

    Drawn with torch's own generator, so that resumed training draws what it would have drawn.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.skipped: int | Tensor = 0

    def draw(self, training: bool) -> None:
        """Draw from U{0 … layers − 1} for a training pass; 0 for any other."""
        self.skipped = 0
        if training:
            drawn = torch.randint(self.layers, ())
            self.skipped = drawn if torch.compiler.is_compiling() else int(drawn)


class Serial(Bottleneck):
    """y + branch(y); where y is a norm's output that is watched, norm(x_norm + branch(y)).

    The second is Pfeiffer's order in a block that ends in a norm: v = norm(u + x), and then
    norm(up φ(down v) + u + x), with u + x the norm's own input.
    """

    depth: Depth | None = None

    def after(self, t: Tensors, x: Tensor, y: Tensor, training: bool) -> Tensor:
        """The output y (…, D) with the bottleneck's change."""
        skipped, layer = self.depth.skipped if self.depth else 0, self.site.layer or 0
        if isinstance(skipped, int) and layer < skipped:
            return y
        change = self.branch(t, y, training)
        if isinstance(skipped, Tensor):  # in a traced graph, which cannot branch on a draw
            change = change * (skipped <= layer).to(y.device, y.dtype)
        for call in self.seen.values():
            if call.y is y:
                return call.again(call.x + change)
        return y + change

    def gate_input(self, x: Tensor, y: Tensor) -> Tensor:
        """The bottleneck's input, which is the host's output."""
        return y

    @property
    def gate_width(self) -> int:
        """Width of the host's output."""
        return self.site.n_out


class DrawingSerial(Serial):
    """The one among an adapter's deltas that draws for all."""

    def begin(self, batch: Batch) -> None:
        """Draw how many layers this pass leaves out."""
        if self.depth is not None:
            self.depth.draw(batch.training)


class Kronecker(Serial):
    """A bottleneck whose projections are H = Σᵢ Aᵢ ⊗ (uᵢ vᵢ), y = x H (Compacter).

    A (P, P, P); down u (P, D/P, R), v (P, R, M/P); up u (P, M/P, R), v (P, R, D/P).
    """

    def maps(self, t: Tensors) -> tuple[Tensor, Tensor]:
        """The projections, put together from their factors."""
        down = kronecker_sum(t["rule"], t["down_u"] @ t["down_v"])
        return down, kronecker_sum(t["rule"], t["up_u"] @ t["up_v"])


def kronecker_sum(a: Tensor, b: Tensor) -> Tensor:
    """(Σᵢ Aᵢ ⊗ Bᵢ)ᵀ, (out, in): A (P, P, P), B (P, in/P, out/P)."""
    out = a.shape[2] * b.shape[2]
    return torch.einsum("iab,ijk->bkaj", a, b).reshape(out, -1)


class Parallel(Bottleneck):
    """y + branch(x), x what enters the part, or the residual stream that it was made from.

    With `norms`, those of the block, it is the stream: in a block that starts with a norm the input
    of the norm whose output enters, in any other what enters. Where the block's attention enters is
    watched too, to tell which comes first, and the block, whose end ends what was seen.
    """

    norms: tuple[str, ...] = ()

    def after(self, t: Tensors, x: Tensor, y: Tensor, training: bool) -> Tensor:
        """The output y (…, D_out) with the change made from x (…, D_in)."""
        return y + self.branch(t, self.gate_input(x, y), training)

    def gate_input(self, x: Tensor, y: Tensor) -> Tensor:
        """The bottleneck's input."""
        if not self.norms or next(iter(self.seen)) not in self.norms:
            return x
        entered = self.seen[str(self.site.enter)].x
        for norm in self.norms:
            if norm in self.seen and self.seen[norm].y is entered:
                return self.seen[norm].x.to(x.dtype)
        raise SiteError(
            f"what enters {self.site.enter} is not the output of a norm of its block, so its "
            "residual stream cannot be told; use reads='input'"
        )


class ParallelHeads(Bottleneck):
    """Concatenated heads + branch(x), before attention's out-projection; x enters the attention."""

    def before(self, t: Tensors, x: Tensor, training: bool) -> Tensor:
        """The out-projection's input (…, h·d_h) with the change."""
        entered = self.seen[str(self.site.enter)].x.to(x.dtype)
        return x + self.branch(t, entered, training)

    @property
    def gate_width(self) -> int:
        """Width of the heads, which a gate over a change of them reads."""
        return self.site.n_out


def block_of(site: Site, places: Sites) -> Site:
    """The block that a site lies in. Raises SiteError where it lies in none."""
    around = [b for b in places.whole if b.role == "block" and site.path.startswith(b.path + ".")]
    if not around:
        raise SiteError(f"{site.path} lies in no block, so it has no residual stream")
    return max(around, key=lambda block: len(block.path))


def refuse_pieces(block: nn.Module, site: Site) -> None:
    """Raise SiteError where a block computes its feed-forward part in pieces, norms and all."""
    if getattr(block, "chunk_size_feed_forward", 0):
        raise SiteError(
            f"{site.path} computes its feed-forward part in pieces, which hides what its norms "
            "give; set chunk_size_feed_forward to 0 in the model's config"
        )


def norms_in(block: Site, places: Sites) -> tuple[str, ...]:
    """Paths of the norms in a block that are as wide as its states."""
    return tuple(
        site.path
        for site in places.whole
        if site.kind == "norm"
        and site.n_out == block.n_out
        and site.path.startswith(block.path + ".")
    )


def trained_norms(model: nn.Module, places: Sites, near: Iterable[Delta]) -> list[Delta]:
    """Trained copies of every norm in the layers where these deltas stand."""
    layers = {(d.site.stack, d.site.layer) for d in near if d.site.layer is not None}
    modules = base_modules(model)
    norms = [s for s in places.whole if s.kind == "norm" and (s.stack, s.layer) in layers]
    return replacements({site.path: modules[site.path] for site in norms})
