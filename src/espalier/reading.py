"""Reading learned gates: how much of each part of a gated sum acts, layer by layer."""

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
from espalier.plain.gated import GatedDelta


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


def _gated(adapter: Adapter) -> list[tuple[GatedDelta, str]]:
    """Each gate's delta with the name of the method that it gates."""
    found: list[tuple[GatedDelta, str]] = []
    for slots in adapter.slots.values():
        for slot in slots:
            for delta, key in slot.users:
                if isinstance(delta, GatedDelta) and key == "gate_a":
                    method = adapter.recipe.methods[int(slot.label.partition("/")[0])]
                    found.append((delta, type(getattr(method, "part", method)).__name__))
    return found
