"""Honest counting: what trains, what it changes in the model, and what has to be kept.

Trained parameters, changed parameters and the rank of the change are three different numbers
(LoRA trains 0.3 % and changes 13 % of BERT); the task head is counted apart from the method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from espalier import hosts
from espalier.adapter import Adapter, form
from espalier.graft import find, get
from espalier.modules import base_modules, unwrap
from espalier.verbs import deltas_of


@dataclass(frozen=True, slots=True)
class Account:
    """Counts of one adapter.

    Attributes:
        trained: Scalars that the method trains, without the head.
        head: Scalars of the task head, trained and kept beside it.
        changed: Scalars of the base-shaped model that differ once the adapter is merged.
        rank: Bound on the rank of the change of any weight; None where the method sets none.
        kept: Scalars kept for serving, with the head; a prefix drops the network that made it.
            Whole numbers (where a mask's scalars lie) are in `bytes` alone.
        bytes: Bytes kept on disk for them, without the file's header.
        total: Scalars of the base, tied ones once; those in 4 bits as the numbers they stand for.
        mergeable: Whether all of it can be written into the base's weights.
    """

    trained: int
    head: int
    changed: int
    rank: int | None
    kept: int
    bytes: int
    total: int
    mergeable: bool

    @property
    def percent(self) -> float:
        """Trained scalars of the method in percent of the base's."""
        return 100 * self.trained / self.total

    def __str__(self) -> str:
        rank = "any rank" if self.rank is None else f"rank ≤ {self.rank}"
        return (
            f"trains {self.trained:,} ({self.percent:.3g} % of {self.total:,}) + head "
            f"{self.head:,}; changes {self.changed:,} ({rank}); keeps {self.bytes:,} bytes"
        )


def account(model: nn.Module, name: str) -> Account:
    """Count an attached adapter. Raises AdapterError when there is none of that name."""
    adapter = get(model, name)
    slots = [slot for kind in adapter.flat for slot in adapter.slots[kind]]
    in_head = [slot for slot in slots if slot.label.startswith("head/")]
    of_head = {id(delta) for slot in in_head for delta, _ in adapter.users[slot.label]}
    head = sum(slot.stop - slot.start for slot in in_head)
    modules = base_modules(model)
    # What several deltas do to one host overlaps in its scalars and adds up in its rank.
    counts: dict[str, int] = {}
    ranks: dict[str, int | None] = {}
    for delta in adapter.deltas:
        if id(delta) in of_head:
            continue
        path = delta.site.path
        host = modules[path]
        count, rank = delta.changed(host)
        most = sum(map(hosts.count, host.parameters(recurse=False))) or count
        counts[path] = min(counts.get(path, 0) + count, most)
        before = ranks.get(path, 0)
        ranks[path] = None if rank is None or before is None else before + rank
    held = (p for m in modules.values() for p in m._parameters.values() if p is not None)
    own = {id(p): hosts.count(p) for p in held}
    kept = _kept(model, adapter)
    dtypes = (flat.dtype for flat in adapter.runs.values() if flat.is_floating_point())
    dtype = next(dtypes, torch.float32)
    whole = sum(count for kind, count in kept.items() if not form(kind, dtype).is_floating_point)
    bounds = [rank for rank in ranks.values() if rank is not None]
    return Account(
        trained=sum(slot.stop - slot.start for slot in slots) - head,
        head=head,
        changed=min(sum(counts.values()), sum(own.values())),
        rank=max(bounds, default=0) if len(bounds) == len(ranks) else None,
        kept=sum(kept.values()) - whole,
        bytes=sum(count * form(kind, dtype).itemsize for kind, count in kept.items()),
        total=sum(own.values()),
        mergeable=all(delta.mergeable for delta in adapter.deltas),
    )


def _kept(model: nn.Module, adapter: Adapter) -> dict[str, int]:
    """Scalars by kind of buffer that the adapter's plain form holds."""
    parts = adapter.recipe.plain()
    if parts == adapter.recipe:
        return {kind: flat.numel() for kind, flat in adapter.runs.items()}
    deltas, _ = deltas_of(unwrap(model), find(model).places, parts, list(adapter.head) or False)
    specs = {id(spec): spec for _, delta in deltas for spec in delta.trained.values()}
    counts: dict[str, int] = {}
    for spec in specs.values():
        counts[spec.kind] = counts.get(spec.kind, 0) + math.prod(spec.shape)
    return counts
