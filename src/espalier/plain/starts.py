"""How the factors of a low-rank change start: at random, or within the weight itself."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import init

from espalier import hosts
from espalier.errors import SiteError
from espalier.places import Site


def uniform(a: Tensor) -> None:
    """Uniform in ±1/√fan_in: Kaiming's with a = √5, what a linear layer starts with."""
    bound = 1 / math.sqrt(a[0].numel())
    a.uniform_(-bound, bound)


def gaussian(a: Tensor) -> None:
    """Normal with a standard deviation of 1/R."""
    init.normal_(a, std=1 / a.shape[0])


def orthogonal(a: Tensor) -> None:
    """Orthonormal rows."""
    a.copy_(init.orthogonal_(torch.empty_like(a, dtype=torch.float32)))  # not made in bf16


# What A starts as where B starts at zero.
RANDOM: dict[str, Callable[[Tensor], None]] = {
    "kaiming": uniform, "gaussian": gaussian, "orthogonal": orthogonal,
}  # fmt: skip
_MORE = 8  # directions that random projection looks for beyond those asked, for its accuracy
_PRINCIPAL = re.compile(r"pissa(?:_niter_(\d+))?")


@cache
def principal(name: str) -> bool:
    """Whether a start takes its factors from the weight: "pissa", or "pissa_niter_4"."""
    return _PRINCIPAL.fullmatch(name) is not None


def pace(init: str, plus: float) -> float:
    """A learning rate at which W moves in a step about as far as at 5e-4 with a random A.

    At the same rate it moves three times as far with both factors within W, and eleven times with
    a B that learns 16 times as fast: so far that all texts became alike.
    """
    return 2e-4 if principal(init) else 5e-4 / math.sqrt(plus)


Fill = Callable[[Tensor], object]


def principal_factors(
    name: str, host: nn.Module, site: Site, rank: int, scale: float
) -> tuple[Fill, Fill]:
    """What fills A₀ and B₀ with the R leading singular directions of W: s·B₀·A₀ = U_R S_R V_Rᵀ.

    The decomposition (fp32; of the dequantised weight where it is packed) is made when the first
    is filled. "pissa_niter_N" finds the directions by N rounds of random projection instead,
    which is far faster on large weights.

    Raises:
        SiteError: W has fewer than R singular directions.
    """
    read = _PRINCIPAL.fullmatch(name)
    assert read is not None
    shape = (site.n_out, site.n_in * math.prod(site.conv.kernel if site.conv else ()))
    if rank > min(shape):
        raise SiteError(
            f"a start of {name!r} and rank {rank} cannot be taken from {site.path}: its weight of "
            f"{shape[0]} × {shape[1]} has {min(shape)} singular directions"
        )

    @cache
    def found() -> tuple[Tensor, Tensor]:
        w = hosts.dense(host, site)
        w = (w if site.rows is None else site.rows.take(w.T).T).flatten(1)
        if read[1] is None:
            u, s, vt = torch.linalg.svd(w, full_matrices=False)
        else:
            wider = min(rank + _MORE, *shape)
            u, s, v = torch.svd_lowrank(w, wider, niter=int(read[1]))
            vt = v.T
        root = (s[:rank] / scale).sqrt()
        return root.unsqueeze(1) * vt[:rank], u[:, :rank] * root

    return (
        lambda a: a.copy_(found()[0].view_as(a)),
        lambda b: b.copy_(found()[1].view_as(b)),
    )
