"""Putting adapters into a live model and taking them out: attach, activate, detach, parameters.

Everything of ours in a model is one reserved child of its root, `espalier`, which holds the
adapters' buffers, and one bound method per adapted module (seat.py). Trained copies of the base's
own parameters stand in for them by a name in the module's instance dictionary, which Python finds
before the registered parameter: the base's keys and values stay where they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from espalier import hosts
from espalier.adapter import Adapter
from espalier.deltas import CHILD, Delta, Method, Recipe, base_modules, recipe, unwrap
from espalier.errors import AdapterError, SettingError, SiteError, nearest
from espalier.heads import Head, head_modules
from espalier.places import Sites, sites
from espalier.plain import replacements
from espalier.seat import Seat

Choice = str | Sequence[str] | Mapping[str, float] | None


class Graft(nn.Module):
    """What stands in one model: its adapters, its seats, and which adapters are live.

    Attributes:
        adapters: Every attached adapter by name.
        live: (name, weight) of the active ones, in the order in which they act.
        seats: By path of the host.
        stand_ins: For each adapter the (module, delta) pairs that replace parameters in place.
        merged: What undoes a merge, and the adapters that were live before it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.adapters: dict[str, Adapter] = {}
        self.live: tuple[tuple[str, float], ...] = ()
        self.seats: dict[str, Seat] = {}
        self.stand_ins: dict[str, list[tuple[nn.Module, Delta]]] = {}
        self.merged: tuple[list[Callable[[], None]], tuple[tuple[str, float], ...]] | None = None
        self.places: Sites = sites(model)
        self.thawed = [name for name, p in model.named_parameters() if p.requires_grad]
        self._shadows: list[tuple[nn.Module, str]] = []
        self._stale = False

    def __repr__(self) -> str:
        live = ", ".join(n if w == 1 else f"{w:g}·{n}" for n, w in self.live) or "none"
        return f"Graft(adapters={list(self.adapters)}, active={live})"

    def add(self, model: nn.Module, adapter: Adapter) -> None:
        """Register an adapter and give each of its deltas its place."""
        modules = base_modules(model)
        stand_ins = self.stand_ins[adapter.name] = []
        for delta in adapter.deltas:
            host = modules[delta.site.path]
            if delta.replaces and all(
                v.dtype == hosts.parameter(host, k).dtype for k, v in delta.t.items()
            ):
                stand_ins.append((host, delta))
                continue
            seat = self.seats.get(delta.site.path)
            if seat is None:
                seat = self.seats[delta.site.path] = Seat(host, self)
            seat.deltas.setdefault(adapter.name, []).append(delta)
        self.adapters[adapter.name] = adapter
        self.add_module(_key(adapter.name), adapter)
        adapter.refresh = self.refresh

    def remove(self, name: str) -> None:
        """Forget an adapter; seats that hold nothing any more leave their hosts."""
        del self.adapters[name], self._modules[_key(name)], self.stand_ins[name]
        for path, seat in list(self.seats.items()):
            seat.deltas.pop(name, None)
            if not seat.deltas and seat.leave():
                del self.seats[path]

    def refresh(self) -> None:
        """Let the live adapters' trained copies, and no others, stand in for parameters."""
        for module, name in self._shadows:
            module.__dict__.pop(name, None)
        self._shadows = []
        self._stale = False
        for adapter, _ in () if self.merged else self.live:
            for module, delta in self.stand_ins[adapter]:
                for name, view in delta.t.items():
                    view.__deepcopy__ = _placeholder  # autograd's results refuse to be copied
                    module.__dict__[name] = view
                    self._shadows.append((module, name))

    def refuse_merged(self) -> None:
        """Raise AdapterError while adapters are merged into the base."""
        if self.merged:
            raise AdapterError(
                "an adapter is merged into this model; call esp.unmerge(model) first"
            )

    def before(self, *_: object) -> None:
        """Runs before the model's forward: follow buffers that were moved, replaced or frozen."""
        if torch.compiler.is_compiling():
            return
        for name, _weight in self.live:
            self.adapters[name].sync()
        if self._stale:
            self.refresh()

    def __deepcopy__(self, memo: dict[int, Any]) -> Graft:
        copy = self.__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update({k: deepcopy(v, memo) for k, v in self.__dict__.items()})
        for adapter in copy.adapters.values():
            adapter.sync()
        copy._stale = True  # modules still being copied lose what was just put into them
        return copy


def _placeholder(memo: dict[int, Any]) -> Tensor:
    """Stands for a view in a deep copy until the copied adapter makes its own."""
    return torch.empty(0)


def _key(name: str) -> str:
    """A module name for any adapter name: never empty, no dots, no clash with an attribute."""
    return "@" + name.replace("%", "%25").replace(".", "%2E")


def find(model: nn.Module) -> Graft:
    """The model's graft. Raises AdapterError when nothing is attached."""
    graft = unwrap(model)._modules.get(CHILD)
    if not isinstance(graft, Graft):
        raise AdapterError("this model has no adapters; attach one with esp.attach(model, ...)")
    return graft


def get(model: nn.Module, name: str) -> Adapter:
    """An attached adapter. Raises AdapterError naming the ones that there are."""
    adapters = find(model).adapters
    if name not in adapters:
        raise AdapterError(f"no adapter {name!r} in this model; {nearest(name, adapters)}")
    return adapters[name]


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
    graft, adapter = prepare(model, recipe(method), name, head=head, dtype=dtype)
    install(model, graft, adapter)


def prepare(
    model: nn.Module,
    parts: Recipe,
    name: str,
    *,
    head: Head,
    dtype: torch.dtype,
    fresh: bool = True,
) -> tuple[Graft, Adapter]:
    """An adapter built for a model and the graft to install it with; the model is untouched.

    With `fresh` its numbers start as the methods say, else as zeros that the caller fills.
    """
    model = unwrap(model)
    graft = model._modules.get(CHILD)
    if not isinstance(graft, Graft):
        graft = Graft(model)
    _check_free(graft, name)
    deltas, paths = _deltas(model, graft.places, parts, head)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return graft, Adapter(name, parts, deltas, paths, device, dtype, fresh)


def install(model: nn.Module, graft: Graft, adapter: Adapter) -> None:
    """Put a prepared adapter into the model, freeze the base, and make the adapter active."""
    model = unwrap(model)
    if CHILD not in model._modules:
        model.add_module(CHILD, graft)
        model.register_forward_pre_hook(graft.before)
    graft.add(model, adapter)
    prefix = CHILD + "."
    for path, parameter in model.named_parameters():
        if parameter.requires_grad and not path.startswith(prefix):
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


def _deltas(
    model: nn.Module, places: Sites, parts: Recipe, head: Head
) -> tuple[list[tuple[str, Delta]], tuple[str, ...]]:
    """Every delta of a recipe with its label, the task head's last; and the head's modules."""
    deltas: list[tuple[str, Delta]] = []
    for index, method in enumerate(parts.methods):
        for delta in method.deltas(model, places):
            rows = f":{delta.site.role}" if delta.site.rows else ""
            deltas.append((f"{index}/{delta.site.path}{rows}", delta))
    taken = _replaced([delta for _, delta in deltas], parts)
    modules = {path: model.get_submodule(path) for path in head_modules(model, places, head)}
    heads = replacements(modules, lambda path, name: (path, name) not in taken)
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
        for key in delta.trained if delta.replaces else ():
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
            scales what an adapter adds; a task head is taken whole.

    Raises:
        AdapterError: An unknown name; a merged adapter; two adapters that both replace one tensor.
    """
    live = resolve(model, choice)
    graft = find(model)
    graft.live = live
    for name, _ in live:
        graft.adapters[name].sync()
    graft.refresh()


def resolve(model: nn.Module, choice: Choice) -> tuple[tuple[str, float], ...]:
    """(name, weight) of the chosen adapters, checked as `activate` says."""
    find(model).refuse_merged()
    if isinstance(choice, str):
        choice = (choice,)
    pairs: Iterable[tuple[str, float]] = (
        choice.items() if isinstance(choice, Mapping) else ((name, 1.0) for name in choice or ())
    )
    live = tuple((name, float(weight)) for name, weight in pairs)
    owner: dict[tuple[str, str], str] = {}
    for name, _ in live:
        adapter = get(model, name)
        for delta in adapter.deltas if len(live) > 1 else ():
            for key in delta.t if delta.replaces else ():
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
    get(model, name)
    graft.refuse_merged()
    activate(model, {n: w for n, w in graft.live if n != name})
    graft.remove(name)
    if graft.adapters:
        return
    model = unwrap(model)
    del model._modules[CHILD]
    for key, hook in list(model._forward_pre_hooks.items()):
        if getattr(hook, "__self__", None) is graft:
            del model._forward_pre_hooks[key]
    thawed = set(graft.thawed)
    for path, parameter in model.named_parameters():
        parameter.requires_grad = path in thawed


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


def groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser; vectors (biases, scales, norms) are never decayed."""
    graft = find(model)
    flats = [
        (kind, flat)
        for name, _ in graft.live
        for kind, flat in graft.adapters[name].flat.items()
        if flat.requires_grad
    ]
    decay = {"matrices": weight_decay, "vectors": 0.0}
    return [{"params": [flat], "weight_decay": decay[kind], "name": kind} for kind, flat in flats]


def dead_sites(model: nn.Module) -> list[str]:
    """Sites of the training adapters where the last backward left no gradient other than zero."""
    graft = find(model)
    return [
        label
        for name, _ in graft.live
        if any(p.requires_grad for p in graft.adapters[name].parameters())
        for label in graft.adapters[name].dead()
    ]
