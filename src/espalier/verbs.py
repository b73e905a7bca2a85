"""Putting adapters into a live model and taking them out: attach, activate, detach, parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from espalier.adapter import Adapter
from espalier.attention import caller
from espalier.deltas import Delta
from espalier.errors import AdapterError, SettingError, SiteError
from espalier.graft import Graft, find, get
from espalier.heads import Head, head_modules
from espalier.modules import base_modules, one_walk, unwrap
from espalier.places import CHILD, Sites
from espalier.plain.whole import replacements
from espalier.recipes import Method, Recipe, recipe
from espalier.routes import route

Choice = str | Sequence[str] | Mapping[str, float] | None


def attach(
    model: nn.Module,
    method: Method | Recipe | str | object,
    name: str = "default",
    *,
    head: Head = "auto",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Freeze the base, add a recipe's deltas under a name, and make them the active adapter.

    Args:
        model: Any transformers model or torch module. It keeps its class and its keys.
        method: A method, a sum of methods, or text such as "LoRA(rank=8)".
        name: Any text; several adapters may be attached.
        head: The task head to train and save with it: "auto" finds the newly initialised one,
            False trains none, a list names modules.
        dtype: Type of the trained numbers; fp32 by default, also over a bf16 base.

    Raises:
        SettingError: The recipe is wrong.
        SiteError: A selector matches nothing, or a method cannot stand where it was sent.
        AdapterError: The name is taken, or an adapter is merged into the base.
    """
    parts = recipe(method)
    with one_walk(model):
        graft, adapter = prepare(model, parts, name, head=head, dtype=dtype)
        install(model, graft, adapter)


def prepare(
    model: nn.Module,
    parts: Recipe,
    name: str,
    *,
    head: Head,
    dtype: torch.dtype,
    fresh: bool | None = True,
) -> tuple[Graft, Adapter]:
    """An adapter built for a model and the graft to install it with; the model is untouched.

    With `fresh` its numbers start as the methods say, else as zeros that the caller fills by its
    deltas' views. None is for who fills the buffers: views are made when it is installed.
    """
    model = unwrap(model)
    graft = model._modules.get(CHILD)
    if not isinstance(graft, Graft):
        graft = Graft(model)
    _check_free(graft, name)
    deltas, paths = deltas_of(model, graft.places, parts, head)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    adapter = Adapter(name, parts, deltas, paths, device, dtype, fresh)
    if fresh is not None:
        adapter.sync()
    return graft, adapter


def install(model: nn.Module, graft: Graft, adapter: Adapter) -> None:
    """Put a prepared adapter into the model, freeze the base, and make the adapter active."""
    model = unwrap(model)
    adapter.sync()
    if CHILD not in model._modules:
        model.add_module(CHILD, graft)
        graft.listen()
    graft.add(model, adapter)
    for module in base_modules(model).values():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad:
                parameter.requires_grad = False
    activate(model, adapter.name)


def _check_free(graft: Graft, name: str) -> None:
    if not isinstance(name, str) or not name:
        raise SettingError(f"an adapter's name is text of at least one letter, not {name!r}")
    if name in graft.adapters:
        raise AdapterError(
            f"an adapter {name!r} is attached already; detach it first or choose another name"
        )
    graft.refuse_merged()


def deltas_of(
    model: nn.Module, places: Sites, parts: Recipe, head: Head
) -> tuple[list[tuple[str, Delta]], tuple[str, ...]]:
    """Every delta of a recipe with its label, the task head's last; and the head's modules."""
    deltas: list[tuple[str, Delta]] = []
    modules = {path: model.get_submodule(path) for path in head_modules(model, places, head)}
    places = places.beside(modules)
    for index, method in enumerate(parts.methods):
        for delta in method.deltas(model, places):
            part = f":{delta.site.role}" if delta.site.rows or delta.site.span else ""
            deltas.append((f"{index}/{delta.site.path}{part}", delta))
    base = base_modules(model)
    for _, delta in deltas:  # both raise where their deltas cannot stand
        if delta.attends:
            caller(base, delta.site)
        elif delta.embeds:
            route(model, places, delta)
    taken = _replaced([delta for _, delta in deltas], parts)
    heads = replacements(modules, lambda path, name: (path, name) not in taken, head=True)
    deltas += [(f"head/{delta.site.path}", delta) for delta in heads]
    # A method may have taken all of a head (full tuning); it is the task's head all the same.
    paths = tuple(path for path, module in modules.items() if module._parameters)
    if not deltas:
        raise SiteError(
            f"{parts} trains nothing here: this model has no newly initialised head. "
            'Name its modules with head=["classifier"], or choose a method that adds something'
        )
    return deltas, paths


def _replaced(deltas: Iterable[Delta], parts: Recipe) -> set[tuple[str, str]]:
    """(path, name) of every parameter that has a trained copy; none may have two."""
    taken: set[tuple[str, str]] = set()
    for delta in deltas:
        for key in delta.parameters:
            if (delta.site.path, key) in taken:
                raise SettingError(
                    f"two methods of {parts} both train {delta.site.path}.{key} itself; leave "
                    "it to one of them"
                )
            taken.add((delta.site.path, key))
    return taken


def activate(model: nn.Module, choice: Choice) -> None:
    """Make one adapter active, several (stacked in order), a weighted mix, or none.

    Args:
        model: A model with adapters.
        choice: A name, a list of names, {"a": 0.7, "b": 0.3}, or None for the bare base. A weight
            scales what an adapter adds, and the share of attention that keys it brings get; a
            task head is taken whole.

    Raises:
        AdapterError: An unknown name, or one given twice; a merged adapter; two adapters that both
            replace one tensor; a weight below 0 for an adapter that brings keys, or other than 1
            for one that brings words or trained copies of the base's own parameters.
    """
    graft = find(model)
    graft.live = live = resolve(graft, choice)
    for name, _ in live:
        graft.adapters[name].sync()
    graft.refresh()


def resolve(graft: Graft, choice: Choice) -> tuple[tuple[str, float], ...]:
    """(name, weight) of the chosen adapters, checked as `activate` says."""
    graft.refuse_merged()
    if isinstance(choice, str):
        graft.get(choice)
        return ((choice, 1.0),)
    if not isinstance(choice, Iterable | None):
        raise SettingError(f"adapters are chosen by name, as 'mail', not by {choice!r}")
    given: Iterable[tuple[str, float]] = (
        choice.items() if isinstance(choice, Mapping) else ((name, 1.0) for name in choice or ())
    )
    pairs = list(given)
    for name, weight in pairs:
        if isinstance(weight, bool | str) or not math.isfinite(weight):
            raise SettingError(f"the weight of {name!r} is a finite number, not {weight!r}")
    live = tuple((name, float(weight)) for name, weight in pairs)
    names = [name for name, _ in live]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise AdapterError(f"{double!r} is named twice; an adapter acts once, or with a weight")
    owner: dict[tuple[str, str], str] = {}
    for name, weight in live:
        adapter = graft.get(name)
        if weight < 0 and any(delta.attends for delta in adapter.deltas):
            raise AdapterError(
                f"{name!r} brings keys to attend to; its weight multiplies their share of the "
                f"attention and cannot be below 0, as {weight:g} is"
            )
        if weight != 1 and any(delta.embeds for delta in adapter.deltas):
            raise AdapterError(
                f"{name!r} puts words before the text, which are there or not: its weight must be "
                f"1, not {weight:g}"
            )
        copies = (d for d in adapter.deltas if d.replaces and d.site.path not in adapter.head)
        if weight != 1 and (copy := next(copies, None)):
            raise AdapterError(
                f"{name!r} trains {copy.site.path} itself, which is taken whole or not at all: its "
                f"weight must be 1, not {weight:g}"
            )
        for delta in adapter.deltas if len(live) > 1 else ():
            for key in delta.parameters:
                other = owner.setdefault((delta.site.path, key), name)
                if other != name:
                    raise AdapterError(
                        f"adapters {other!r} and {name!r} both bring their own "
                        f"{delta.site.path}.{key}; activate one of them"
                    )
    return live


def active(model: nn.Module) -> dict[str, float]:
    """The active adapters with their weights, in the order in which they act."""
    return dict(find(model).live)


def only_active(model: nn.Module) -> str:
    """The name of the one active adapter. Raises AdapterError when none or several are active."""
    names = list(active(model))
    if len(names) != 1:
        found = ", ".join(map(repr, names)) or "none"
        raise AdapterError(
            f"one adapter should be active, found {found}; choose it with esp.activate(model, name)"
        )
    return names[0]


def detach(model: nn.Module, name: str) -> None:
    """Take an adapter out. With the last one the model is as it was before the first.

    Raises:
        AdapterError: It is unknown, or merged into the base.
    """
    graft = find(model)
    graft.get(name)
    graft.refuse_merged()
    activate(model, {n: w for n, w in graft.live if n != name})
    graft.remove(name)
    if graft.adapters:
        return
    model = unwrap(model)
    del model._modules[CHILD]
    graft.leave()
    for path, module in base_modules(model).items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                parameter.requires_grad = (path, key) in graft.thawed


def has_plain(model: nn.Module, name: str) -> bool:
    """Whether an adapter trains in a richer form than it serves in, as `to_plain` says."""
    parts = get(model, name).recipe
    return parts.plain() != parts


def to_plain(model: nn.Module, name: str) -> bool:
    """Turn an adapter into the plain form that serves what it trained; False if it is plain.

    What only training needed goes: a prefix keeps its keys and values and drops the network that
    made them. Outputs stay as they were, to rounding.

    Raises:
        AdapterError: No such adapter, or one is merged into the base.
    """
    graft, rich = find(model), get(model, name)
    graft.refuse_merged()
    if any(regime.total and not regime.settled for regime in rich.regimes):
        warnings.warn(
            f"adapter {name!r} ({rich.recipe}) becomes plain before its schedule has ended; "
            "what it would still have changed stays as it is",
            stacklevel=2,
        )
    parts = rich.recipe.plain(rich.built)
    if parts == rich.recipe:
        return False
    first = next(iter(rich.runs.values()))
    deltas, paths = deltas_of(unwrap(model), graft.places, parts, list(rich.head) or False)
    dtype = next((r.dtype for r in rich.runs.values() if r.is_floating_point()), torch.float32)
    served = Adapter(name, parts, deltas, paths, first.device, dtype, fresh=False)
    served.sync()
    with torch.no_grad():
        for old, new in zip(rich.deltas, served.deltas, strict=True):
            for key, value in old.plain(old.t).items():
                new.t[key].data.copy_(value)  # the view's own history stays untouched
    served.requires_grad_(any(p.requires_grad for p in rich.parameters()))
    live, graft.live, skipped = graft.live, (), graft.skipped[name]
    graft.remove(name)
    graft.add(unwrap(model), served, skipped)
    served.sync()
    graft.live = live
    graft.refresh()
    return True


def skip_layers(model: nn.Module, count: int, name: str | None = None) -> None:
    """Let adapters act from layer `count` on only: faster the more they skip (AdapterDrop).

    A choice of the moment: nothing is lost or saved, and 0 puts every layer back. What belongs to
    no layer (a task head, a trained copy of a parameter) goes on acting.

    Args:
        model: A model with adapters.
        count: How many layers to skip, from the lowest; in every stack where there are two.
        name: The adapter; all active ones by default.

    Raises:
        SettingError: The count is no whole number of at least 0.
        AdapterError: The name is unknown, or an adapter is merged into the base.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise SettingError(f"skip_layers takes a whole number of at least 0, not {count!r}")
    graft = find(model)
    graft.refuse_merged()
    for one in list(active(model)) if name is None else [name]:
        graft.place(unwrap(model), get(model, one), count)
    graft.refresh()


def freeze(model: nn.Module, name: str) -> None:
    """Keep an adapter's numbers fixed from now on; it can be active beside one that trains."""
    adapter = get(model, name)
    adapter.requires_grad_(False)
    adapter.sync()


def thaw(model: nn.Module, name: str) -> None:
    """Let an adapter train again."""
    adapter = get(model, name)
    adapter.requires_grad_(True)
    adapter.sync()


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """What trains: the flat buffers of the active adapters that are not frozen."""
    return [p for group in groups(model) for p in group["params"]]


def constants(model: nn.Module) -> list[Tensor]:
    """What the active adapters keep and never train: frozen projections, chosen indices."""
    graft = find(model)
    adapters = (graft.adapters[name] for name, _ in graft.live)
    return [b for adapter in adapters for b in adapter._buffers.values() if b is not None]


def groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    learning_rate: float | None = None,
    head_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser; vectors (biases, scales, norms) are never decayed.

    Args:
        model: A model with adapters.
        weight_decay: For matrices.
        learning_rate: The rate to give each group, times the factor that its numbers ask for
            (LoRA+ trains B faster than A). Without it groups carry no rate of their own.
        head_rate: The task head's learning rate, where it differs.
    """
    graft = find(model)
    found: list[dict[str, Any]] = []
    for name, _ in graft.live:
        adapter = graft.adapters[name]
        for kind, flat in adapter.flat.items():
            if not flat.requires_grad:
                continue
            decay = weight_decay if "matrices" in kind else 0.0
            group: dict[str, Any] = {"params": [flat], "weight_decay": decay, "name": kind}
            of_head = kind.startswith("head_") and head_rate is not None
            rate = head_rate if of_head else learning_rate
            if rate is not None:
                group["lr"] = rate * adapter.rates[kind]
            found.append(group)
    return found


def dead_sites(model: nn.Module) -> list[str]:
    """Sites of the training adapters where the last backward left no gradient other than zero."""
    graft = find(model)
    return [
        label
        for name, _ in graft.live
        if any(p.requires_grad for p in graft.adapters[name].parameters())
        for label in graft.adapters[name].dead()
    ]
