"""Low-rank deltas as other libraries keep them: one pair of matrices for each whole layer.

A slice of a fused layer becomes a change of the whole layer with zero rows elsewhere; several
low-rank deltas on one layer become one of the summed rank. Both are exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espalier import hosts
from espalier.adapter import Adapter
from espalier.deltas import Delta
from espalier.errors import CheckpointError
from espalier.interop.targets import selector
from espalier.methods.lora import LoRA
from espalier.places import Site, Sites
from espalier.plain.directed import Directed
from espalier.plain.lowrank import LowRank, LowRankConv, LowRankEmbedding
from espalier.recipes import Recipe

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


def is_low(adapter: Adapter) -> bool:
    """Whether all changes of an adapter are low-rank, rows stretched (DoRA) or not."""
    changes = [delta for here in by_host(adapter).values() for delta in here]
    return bool(changes) and all(isinstance(delta, KINDS) for delta in changes)


def by_host(adapter: Adapter) -> dict[str, list[Delta]]:
    """The changes of an adapter by the path of their host, without those of rank 0."""
    found: dict[str, list[Delta]] = {}
    for delta in adapter.deltas:
        if not delta.replaces and delta.trained:
            found.setdefault(delta.site.path, []).append(delta)
    return found


def joined(deltas: list[Delta]) -> Low:
    """The low-rank deltas of one host as one: ranks add up, scales move into B."""
    parts = [_low(delta) for delta in deltas]
    if len(parts) == 1:
        return parts[0]
    a = torch.cat([part.a for part in parts])
    b = torch.cat([part.b * part.scale for part in parts], dim=1)
    return Low(a, b, 1.0, parts[0].table)


def _low(delta: Delta) -> Low:
    assert isinstance(delta, KINDS)
    t = delta.plain({key: view.detach() for key, view in delta.t.items()})
    a, b, rows = t["a"], t["b"], delta.site.rows
    if rows is not None:
        b = rows.place(b.new_zeros(b.shape[1], rows.groups * rows.width), b.T).T
    return Low(a, b, delta.scale, isinstance(delta, LowRankEmbedding))


def is_dora(adapter: Adapter) -> bool:
    """Whether any of an adapter's changes stretches rows."""
    return any(isinstance(delta, Directed) for delta in adapter.deltas)


def magnitudes(host: nn.Module, deltas: list[Delta], change: Low) -> Tensor:
    """DoRA's m of a whole host (D_out,), as other libraries train it.

    They stretch every layer of an adapter or none: rows that no DoRA stretches here get the length
    that they have.

    Raises:
        CheckpointError: The host is no linear layer, or its rows are changed several times.
    """
    site = deltas[0].site
    if site.kind not in ("linear", "conv1d"):
        raise CheckpointError(
            f"peft stretches every layer of an adapter or none: {site.path} is a {site.kind}, "
            "which LoRA(dora=True) does not take; save the parts as two adapters"
        )
    if len({delta.site.role for delta in deltas}) < len(deltas):
        raise CheckpointError(
            f"{site.path} has several changes on the same rows, one of them DoRA's, for which "
            "peft has no form; save it in Espalier's own"
        )
    w, own = hosts.dense(host, site), _lengths(host, site)
    found = torch.linalg.vector_norm(w.addmm(change.b, change.a, alpha=change.scale), dim=1)
    for delta in deltas:
        if isinstance(delta, Directed):
            rows, stretched = delta.site.rows, delta.t["m"].detach()
            if rows is None:
                return own + stretched
            found = rows.place(found, rows.take(own) + stretched)
    return found


def stretched(m: Tensor, host: nn.Module, site: Site) -> Tensor:
    """What Espalier trains in place of DoRA's m: the change of each row's length."""
    return m - _lengths(host, site).to(m.device)


def _lengths(host: nn.Module, site: Site) -> Tensor:
    return torch.linalg.vector_norm(hosts.dense(host, site), dim=1)


def loras(
    places: Sites, layers: Mapping[str, tuple[int, float]], bias: str = "none", **settings: Any
) -> Recipe:
    """One LoRA where all layers have one scale, else one for each (rank, alpha) that occurs.

    Args:
        places: All places of the model.
        layers: Rank and alpha by path.
        bias: LoRA's setting; biases of unadapted layers belong to the first of several.
        settings: Further settings that all of them have.
    """
    kinds: dict[tuple[int, float], list[str]] = {}
    for path, kind in layers.items():
        kinds.setdefault(kind, []).append(path)
    power = 0.5 if settings.get("rslora") else 1.0
    (rank, alpha), others = next(iter(kinds)), [*kinds][1:]
    same = (math.isclose(a / r**power, alpha / rank**power, rel_tol=1e-9) for r, a in others)
    if others and all(same):
        where = selector(places, layers)
        ranks = tuple(layers[site.path][0] for site in places.select(where))
        one = LoRA(rank=rank, alpha=alpha, bias=bias, sites=where, ranks=ranks, **settings)
        return Recipe((one,))
    return Recipe(
        tuple(
            LoRA(
                rank=rank,
                alpha=alpha,
                bias=bias if index == 0 or bias == "lora_only" else "none",
                sites=selector(places, paths),
                **settings,
            )
            for index, ((rank, alpha), paths) in enumerate(kinds.items())
        )
    )
