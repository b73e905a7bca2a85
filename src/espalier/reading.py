"""Reading what was learned, layer by layer: how much of each gated part acts, and ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.adapter import Adapter
from espalier.errors import AdapterError, SettingError
from espalier.graft import find, get
from espalier.modules import unwrap
from espalier.plain.adaptive import Triplets
from espalier.plain.directed import Directed
from espalier.plain.gated import GatedDelta
from espalier.plain.lowrank import LowRank, LowRankConv, LowRankEmbedding, Unchanged, rank
from espalier.verbs import only_active

LOW = (LowRank, LowRankConv, LowRankEmbedding, Directed, Unchanged, Triplets)


@dataclass(frozen=True, slots=True)
class Gate:
    """One gate's mean over what was read: 0 shuts its part off, 1 lets all of it act."""

    method: str
    role: str
    stack: str
    layer: int | None
    mean: float


class Gates(tuple[Gate, ...]):
    """The gates of an adapter in model order; prints as a table, `plot` draws it."""

    def __str__(self) -> str:
        lines = [f"{'method':<16} {'role':<14} {'stack':<8} {'layer':>5} {'gate':>6}"]
        for g in self:
            layer = "" if g.layer is None else str(g.layer)
            lines.append(f"{g.method:<16} {g.role:<14} {g.stack:<8} {layer:>5} {g.mean:>6.3f}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> Path:
        """Draw one line per part over the layers into an image file; returns its path.

        Raises:
            SettingError: matplotlib is missing.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise SettingError("drawing needs matplotlib: pip install 'espalier[report]'") from None
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        lines: dict[str, list[Gate]] = {}
        for gate in self:
            stack = f"{gate.stack} " if len({g.stack for g in self}) > 1 else ""
            lines.setdefault(f"{gate.method} at {stack}{gate.role}", []).append(gate)
        for name, gates in lines.items():
            axes.plot([g.layer or 0 for g in gates], [g.mean for g in gates], "o-", label=name)
        axes.set(xlabel="layer", ylabel="mean gate", ylim=(0, 1))
        axes.legend(frameon=False, fontsize="small")
        figure.savefig(path)
        return Path(path)


def gates(model: nn.Module, batches: Iterable[Mapping[str, Any]], name: str | None = None) -> Gates:
    """The mean of every learned gate over some batches.

    Args:
        model: A model whose active adapter has gates; put it into eval mode first.
        batches: What to call the model with, batch by batch.
        name: The adapter, if several are active.

    Raises:
        AdapterError: The adapter has no gates, or some were not used, or no batch was given.
    """
    live = [name] if name is not None else [n for n, _ in find(model).live]
    gated = [pair for one in live for pair in _gated(get(model, one))]
    if not gated:
        raise AdapterError(f"no gates in {', '.join(live) or 'no active adapter'}")
    sums: dict[int, Tensor] = {}
    count = 0
    for batch in batches:
        for delta, _ in gated:
            delta.value = None  # of an earlier pass
        with torch.no_grad():
            unwrap(model)(**batch)
        rows = 0
        for delta, _ in gated:
            if delta.value is None:
                raise AdapterError(
                    f"the gate at {delta.site.path} was not used in this batch; is its adapter "
                    "active, and does its layer act?"
                )
            rows = len(delta.value)
            total = delta.value.float().flatten(1).mean(1).sum()
            sums[id(delta)] = sums.get(id(delta), total.new_zeros(())) + total
        count += rows
    if not count:
        raise AdapterError("give at least one batch to read gates from")
    return Gates(
        Gate(m, d.site.role, d.site.stack, d.site.layer, float(sums[id(d)]) / count)
        for d, m in gated
    )


@dataclass(frozen=True, slots=True)
class Rank:
    """The rank of the change at one place now; 0 where nothing is added."""

    role: str
    stack: str
    layer: int | None
    rank: int


class Ranks(tuple[Rank, ...]):
    """The ranks of an adapter's changes in model order; prints as a table, roles by layers."""

    def __str__(self) -> str:
        layers = list(dict.fromkeys((r.stack, r.layer) for r in self))
        rows = {r.role: dict.fromkeys(layers, "") for r in self}
        for r in self:
            cell = rows[r.role][r.stack, r.layer]
            rows[r.role][r.stack, r.layer] = f"{cell}+{r.rank}" if cell else str(r.rank)
        several = len({stack for stack, _ in layers}) > 1
        names = [f"{s} {n}" if several else "-" if n is None else str(n) for s, n in layers]
        lines = [f"{'layer':<16} " + " ".join(f"{name:>4}" for name in names)]
        for role, cells in rows.items():
            numbers = (f"{c:>{max(4, len(n))}}" for c, n in zip(cells.values(), names, strict=True))
            lines.append(f"{role:<16} " + " ".join(numbers))
        return "\n".join(lines)


def ranks(model: nn.Module, name: str | None = None) -> Ranks:
    """The rank of every low-rank change of an adapter, as it is now.

    Args:
        model: A model with adapters.
        name: The adapter; the active one by default.

    Raises:
        AdapterError: There is no such adapter, or none of its changes has a low rank.
    """
    adapter = get(model, only_active(model) if name is None else name)
    changes = [d.part if isinstance(d, GatedDelta) else d for d in adapter.deltas]
    found = [
        Rank(
            d.site.role, d.site.stack, d.site.layer, d.rank if isinstance(d, Triplets) else rank(d)
        )
        for d in changes
        if isinstance(d, LOW)
    ]
    if not found:
        raise AdapterError(f"{adapter.name!r} ({adapter.recipe}) makes no change of a low rank")
    return Ranks(found)


def _gated(adapter: Adapter) -> list[tuple[GatedDelta, str]]:
    """Each gate's delta with the name of the method that it gates."""
    found: list[tuple[GatedDelta, str]] = []
    for label, users in adapter.users.items():
        for delta, key in users:
            if isinstance(delta, GatedDelta) and key == "gate_a":
                method = adapter.recipe.methods[int(label.partition("/")[0])]
                found.append((delta, type(getattr(method, "part", method)).__name__))
    return found
