"""Merging adapters into the base's weights, and taking them out again to the exact bits.

Arithmetic is fp32 with one cast at the end. The old tensors are kept, never subtracted: rounding
makes W + Δ − Δ differ from W.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from espalier import hosts
from espalier.deltas import Delta, Tensors
from espalier.errors import AdapterError
from espalier.graft import Graft, find
from espalier.modules import base_modules, is_sharded, unwrap
from espalier.verbs import Choice, detach, resolve

Fold = tuple[Delta, float]


def merge(
    model: nn.Module, choice: Choice = None, *, unload: bool = False, untie: bool = False
) -> None:
    """Write adapters into the base's weights, so that they cost nothing at inference.

    Args:
        model: A model with adapters.
        choice: As for `activate`; the active ones by default.
        unload: Keep the merged weights for good and take the merged adapters out.
        untie: Where an adapted weight is shared by another module, give the adapted one its own
            copy first (and say so in the model's config).

    Raises:
        AdapterError: Something cannot be merged exactly; nothing has been changed then.
    """
    graft = find(model)
    live = resolve(graft, dict(graft.live) if choice is None else choice)
    if not live:
        raise AdapterError("no adapter is active; name the one to merge")
    if is_sharded(model):
        raise AdapterError(
            "this base is spread over processes, and a change cannot be written into it: save the "
            "adapter and merge it in one process, with `espalier merge RUN --out FOLDER`"
        )
    folds = collect(graft, live)
    modules = base_modules(model)
    refuse(modules, folds, untie)
    before, graft.live = graft.live, ()
    graft.refresh()
    undo: list[hosts.Undo] = []
    try:
        _fold_all(model, folds, untie, undo)
    except BaseException:
        for step in reversed(undo):
            step()
        graft.live = before
        graft.refresh()
        raise
    graft.merged = (undo, before)
    graft.refresh()  # folding made what no pass will need
    if unload:
        graft.merged = None
        for name, _ in live:
            detach(model, name)


def unmerge(model: nn.Module) -> None:
    """Put the base's exact bits back and make the adapters active that were so before the merge.

    Raises:
        AdapterError: Nothing is merged.
    """
    graft = find(model)
    if graft.merged is None:
        raise AdapterError("no adapter is merged into this model")
    undo, before = graft.merged
    for step in reversed(undo):
        step()
    graft.merged, graft.live = None, before
    graft.refresh()


def fold_dense(model: nn.Module, folds: dict[str, list[Fold]], undo: list[hosts.Undo]) -> None:
    """Fold what changes no quantised weight into the model; what takes it back joins `undo`.

    Whatever shares an adapted weight gets one of its own.
    """
    part = {
        path: [fold for fold in deltas if fold[0].replaces or not fold[0].site.bits]
        for path, deltas in folds.items()
    }
    _fold_all(model, {path: deltas for path, deltas in part.items() if deltas}, True, undo)


def _fold_all(
    model: nn.Module, folds: dict[str, list[Fold]], untie: bool, undo: list[hosts.Undo]
) -> None:
    """Fold every host's deltas into it; what takes it back is added to `undo` step by step."""
    modules = base_modules(model)
    parted = _parted(modules, folds)
    found = {path: _stand_ins(modules[path], deltas) for path, deltas in folds.items()}
    for path, deltas in folds.items():
        own = {name for at, name in parted if at == path}
        undo += _fold(modules[path], deltas, found[path], own, untie)
    tied = any(delta.site.tied for deltas in folds.values() for delta, _ in deltas)
    if untie and (parted or tied):
        undo += hosts.declare_untied(unwrap(model))


def collect(graft: Graft, live: tuple[tuple[str, float], ...]) -> dict[str, list[Fold]]:
    """The deltas to fold at each host, in the order in which they act in the forward pass."""
    folds: dict[str, list[Fold]] = {}
    for name, weight in live:
        for delta in graft.acting(graft.adapters[name]):
            folds.setdefault(delta.site.path, []).append((delta, weight))
    return folds


def _parted(
    modules: dict[str, nn.Module], folds: dict[str, list[Fold]]
) -> dict[tuple[str, str], list[str]]:
    """Parameters with a trained copy that others share without one, and where these are."""
    copied = {
        (path, name)
        for path, deltas in folds.items()
        for delta, _ in deltas
        for name in delta.parameters
    }
    ends = {key: hosts.parameter(modules[key[0]], key[1]) for key in copied}
    shared: dict[int, list[str]] = {id(p): [] for p in ends.values()}
    for path, module in modules.items():
        for name, p in module._parameters.items():
            if id(p) in shared and (path, name) not in copied:
                shared[id(p)].append(path)
    return {key: shared[id(p)] for key, p in ends.items() if shared[id(p)]}


def refuse(
    modules: dict[str, nn.Module], folds: dict[str, list[Fold]], untie: bool, dense: bool = False
) -> None:
    """Raise AdapterError for whatever cannot be merged, before anything is touched.

    With `dense` quantised weights are written densely elsewhere, and so can be.
    """
    parted = _parted(modules, folds)
    tied = {path: others for (path, _), others in parted.items()}
    for path, deltas in folds.items():
        for delta, _ in deltas:
            if not delta.mergeable:
                raise AdapterError(
                    f"the change at {path} ({type(delta).__name__}) cannot be merged: it is no "
                    "change of a weight. Keep the adapter active instead"
                )
            others = tied.get(path, ()) if delta.replaces else delta.site.tied
            if not delta.replaces and not dense:
                hosts.refuse_quantised(delta.site)
            if others and not untie:
                raise AdapterError(
                    f"{path} shares its weight with {', '.join(others)}: merging would "
                    "change both. Merge with untie=True to give it a copy of its own"
                )


def _stand_ins(host: nn.Module, deltas: list[Fold]) -> Tensors:
    """What stands in for the host's parameters, by name; read before any tied one is changed."""
    found: dict[str, Tensor] = {}
    for delta, _ in deltas:
        if delta.replaces:
            own = {name: hosts.parameter(host, name) for name in delta.parameters}
            found.update(delta.effective(delta.t, own, training=False))
    return found


def _fold(
    host: nn.Module, deltas: list[Fold], found: Tensors, own: set[str], untie: bool
) -> list[hosts.Undo]:
    undo = [hosts.put(host, name, value.clone(), own=name in own) for name, value in found.items()]
    changes = [(delta, weight) for delta, weight in deltas if not delta.replaces]
    if not changes:
        return undo
    site, old = changes[0][0].site, hosts.bias(host)
    w, b = folded(host, changes, hosts.dense(host, site), old)
    undo.append(hosts.write(host, site, w, untie and bool(site.tied)))
    if b is not None and b is not old:
        undo.append(hosts.put_bias(host, b))
    return undo


def folded(
    host: nn.Module, deltas: list[Fold], w: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A weight (out, in) and bias in fp32 with the changes of a host's deltas folded in."""
    for delta, weight in _in_effect([fold for fold in deltas if not fold[0].replaces]):
        w, b = _changed(host, delta, weight, w, b)
    return w, b


def _in_effect(deltas: list[Fold]) -> list[Fold]:
    """In the order in which weights take them up: what changes the input last, and in reverse.

    Every delta's `after` sees the input that all of `before` made.
    """
    entering = [fold for fold in deltas if type(fold[0]).before is not Delta.before]
    return [fold for fold in deltas if fold not in entering] + entering[::-1]


def _changed(
    host: nn.Module, delta: Delta, weight: float, w: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with one delta folded in, on the rows that are the delta's."""
    t = {key: value.detach().float() for key, value in delta.t.items()}
    if delta.reads_host:
        t.update(hosts.current(host, delta.site, torch.float32))
    rows = delta.site.rows
    part = w if rows is None else rows.take(w.T).T
    part_b = b if rows is None or b is None else rows.take(b)
    new, new_b = delta.fold(t, part, part_b)
    if weight != 1.0:
        new = part + weight * (new - part)
        if new_b is not None:
            new_b = weight * new_b if part_b is None else part_b + weight * (new_b - part_b)
    if rows is None:
        return new, new_b
    if new_b is None or new_b is part_b:
        return rows.place(w.T, new.T).T, b
    return rows.place(w.T, new.T).T, rows.place(w.new_zeros(len(w)) if b is None else b, new_b)
