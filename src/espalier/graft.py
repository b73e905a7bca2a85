"""What stands in one model: its adapters, its seats, and which adapters are live.

Everything of ours in a model is one reserved child of its root, `espalier`, which holds the
adapters' buffers, and one bound method per adapted module (seat.py). Trained copies of the base's
own parameters stand in for them by a name in the module's instance dictionary, which Python finds
before the registered parameter: the base's keys and values stay where they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from espalier import hosts
from espalier.adapter import Adapter
from espalier.attention import Attention, caller
from espalier.caches import begun, cache_in
from espalier.deltas import Batch, Delta
from espalier.errors import AdapterError, nearest
from espalier.fast.drop import Drop
from espalier.fast.head import Head
from espalier.fast.linear import Readers
from espalier.fast.quick import quicken
from espalier.fast.switch import enabled
from espalier.modules import base_modules, is_sharded, unwrap
from espalier.places import CHILD, Sites, sites
from espalier.prompts import Prompts
from espalier.routes import encoders, names
from espalier.seat import Seat

if TYPE_CHECKING:
    from espalier.fast.decoding import Served
    from espalier.fast.grouped import Stack
    from espalier.mixed import Mixed


class Teller(NamedTuple):
    """A module whose deltas are told what it is given; `takes` names its arguments."""

    module: nn.Module
    takes: tuple[str, ...]
    stack: str | None  # None for the root, with all stacks


class Graft(nn.Module):
    """What stands in one model: its adapters, its seats, and which adapters are live.

    Attributes:
        adapters: Every attached adapter by name.
        live: (name, weight) of the active ones, in the order in which they act.
        seats: By path of the host.
        attentions: By path of the module that attends.
        prompts: The port of deltas that put words among those of the text; None without any.
        stand_ins: For each adapter the (module, delta) pairs that replace parameters in place.
        skipped: In how many of the lowest layers each adapter does not act.
        merged: What undoes a merge, and the adapters that were live before it.
        rows: Which rows of a batch are on which of the live adapters; None while all are on all.
        plans: By path of the host what is live there, where it is products (fast/decoding.py).
        stacks: By path the factors of the adapters that rows were on last (fast/grouped.py).
        tellers: The root, and encoders that are also called without it.
        head: Where logits are put off until they are needed (fast/head.py).
    """

    # A module's own is slow, and no parameter or module is set here by name.
    __setattr__ = object.__setattr__  # type: ignore[assignment]

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.adapters: dict[str, Adapter] = {}
        self._minding: dict[str, Adapter] = {}  # those to tell that they rest
        self._entering: set[str] = set()  # those with something to do where they become live
        self.live: tuple[tuple[str, float], ...] = ()
        self.seats: dict[str, Seat] = {}
        self.attentions: dict[str, Attention] = {}
        self.prompts: Prompts | None = None
        self.stand_ins: dict[str, list[tuple[nn.Module, Delta]]] = {}
        self.skipped: dict[str, int] = {}
        self.merged: tuple[list[Callable[[], None]], tuple[tuple[str, float], ...]] | None = None
        self.rows: Mixed | None = None
        self.plans: dict[str, Served | None] = {}
        self.stacks: dict[str, Stack] = {}
        self.places: Sites = sites(model)
        self.tellers = [Teller(model, names(model), None)]
        for stack, path in encoders(model, self.places).items():
            module = model.get_submodule(path)
            self.tellers.append(Teller(module, names(module), stack))
        self.thawed = {
            (path, name)
            for path, module in base_modules(model).items()
            for name, p in module._parameters.items()
            if p is not None and p.requires_grad
        }
        self.drop, self.readers = Drop(), Readers()
        self._quick = False  # whether it was found out what can be quick in training
        self._shadows: list[tuple[nn.Module, str]] = []
        self._held: list[hosts.Undo] = []  # what quantised hosts are kept from, while we are here
        self._stale = False
        self._cast: list[Adapter] = []  # whose numbers were cast for the pass that runs
        self._warned: set[str] = set()  # adapters whose missing lifecycle was told of

    def __repr__(self) -> str:
        live = ", ".join(n if w == 1 else f"{w:g}·{n}" for n, w in self.live) or "none"
        return f"Graft(adapters={list(self.adapters)}, active={live})"

    def add(self, model: nn.Module, adapter: Adapter, skipped: int = 0) -> None:
        """Register an adapter and give each of its deltas its place, as `place` does."""
        self.place(model, adapter, skipped)
        self.adapters[adapter.name] = adapter
        if adapter.resting:
            self._minding[adapter.name] = adapter
        self.add_module(_key(adapter.name), adapter)
        adapter.refresh = self.refresh

    def place(self, model: nn.Module, adapter: Adapter, skipped: int = 0) -> None:
        """Give each delta of an adapter its place, those of the lowest `skipped` layers none."""
        name = adapter.name
        if name in self.skipped:
            self._displace(name)
        self.skipped[name] = skipped
        modules = base_modules(model)
        apart = is_sharded(model)  # what spreads parameters looks for them by name between calls
        stand_ins = self.stand_ins[name] = []
        for delta in self.acting(adapter):
            for path in delta.watches:
                seat = self.seat(path, modules[path])
                seat.watchers.setdefault(name, []).append(delta)
            host = modules[delta.site.path]
            if delta.attends:
                path, module = caller(modules, delta.site)
                port = self.attentions.get(path) or Attention(module, self)
                self.attentions[path] = port
                port.deltas.setdefault(name, []).append(delta)
            elif delta.embeds:
                self.prompts = self.prompts or Prompts(model, self.places, delta, self)
                self.prompts.deltas.setdefault(name, []).append(delta)
            elif delta.replaces and _direct(delta, host) and not apart:
                stand_ins.append((host, delta))
            else:
                seat = self.seat(delta.site.path, host)
                seat.deltas.setdefault(name, []).append(delta)
        if stand_ins or adapter.waking:
            self._entering.add(name)

    def _displace(self, name: str) -> None:
        """Take an adapter's deltas from their places."""
        for seat in self.seats.values():
            seat.deltas.pop(name, None)
            seat.watchers.pop(name, None)
        for port in self.attentions.values():
            port.deltas.pop(name, None)
        if self.prompts:
            self.prompts.deltas.pop(name, None)

    def get(self, name: str) -> Adapter:
        """An adapter. Raises AdapterError naming the ones that there are."""
        found = self.adapters.get(name)
        if found is None:
            raise AdapterError(f"no adapter {name!r} in this model; {nearest(name, self.adapters)}")
        return found

    def acting(self, adapter: Adapter) -> list[Delta]:
        """An adapter's deltas without those of the layers that it skips."""
        skipped = self.skipped[adapter.name]
        if not skipped:
            return adapter.deltas
        return [d for d in adapter.deltas if d.site.layer is None or d.site.layer >= skipped]

    def seat(self, path: str, host: nn.Module) -> Seat:
        """The seat at a module, made if there is none yet."""
        found = self.seats.get(path)
        if found is None:
            found = self.seats[path] = Seat(path, host, self)
        return found

    def remove(self, name: str) -> None:
        """Forget an adapter; seats that hold nothing any more leave their hosts."""
        del self.adapters[name], self._modules[_key(name)], self.stand_ins[name], self.skipped[name]
        self._minding.pop(name, None)
        self._entering.discard(name)
        self.stacks = {}
        self._displace(name)
        if self.prompts and not self.prompts.deltas:
            self.prompts.leave()
            self.prompts = None
        for path, seat in list(self.seats.items()):
            quick = seat.quick and self.adapters
            if not (seat.deltas or seat.watchers or seat.around or quick) and seat.leave():
                del self.seats[path]
        for path, port in list(self.attentions.items()):
            if not port.deltas and not (self.adapters and port.batches):
                port.leave()
                del self.attentions[path]

    def refresh(self) -> None:
        """Let the live adapters' trained copies, and no others, stand in for parameters."""
        if self._shadows:
            for module, name in self._shadows:
                module.__dict__.pop(name, None)
            self._shadows = []
        self.plans = {}
        self._stale = False
        self.head.forget()
        if self.rows is not None:
            self.rows.forget()
        self.drop.rest()
        live = () if self.merged else self.live
        if self._minding:
            names = {name for name, _ in live}
            for resting in (a for name, a in self._minding.items() if name not in names):
                for delta in resting.resting:
                    delta.rest()
        for name, _weight in live if self._entering else ():
            self._enter(name)
        for port in self.attentions.values():
            port.refresh()

    def _enter(self, adapter: str) -> None:
        """Tell the deltas of a live adapter that mind it, and let its trained copies stand in."""
        for delta in self.adapters[adapter].waking:
            delta.ready()
        for module, delta in () if self.rows else self.stand_ins[adapter]:
            for name, view in delta.t.items():
                view.__deepcopy__ = _placeholder  # autograd's results refuse to be copied
                module.__dict__[name] = view
                self._shadows.append((module, name))

    @property
    def words(self) -> int:
        """How many words the live adapters put beside a text."""
        return self.prompts.length if self.prompts else 0

    def refuse_merged(self) -> None:
        """Raise AdapterError while adapters are merged into the base, or rows have their own."""
        if self.merged:
            raise AdapterError(
                "an adapter is merged into this model; call esp.unmerge(model) first"
            )
        if self.rows is not None:
            raise AdapterError(
                "rows of a batch are on adapters of their own; leave `with esp.rows(...)` first"
            )

    def listen(self) -> None:
        """Be told before the model's forward passes, and its encoders'."""
        for teller in self.tellers:
            teller.module.register_forward_pre_hook(self.before, with_kwargs=True)
        self.tellers[0].module.register_forward_hook(self.after, always_call=True)
        self.head = Head(self.tellers[0].module, self)
        self._held = hosts.hold_layout(base_modules(self.tellers[0].module).values())

    def leave(self) -> None:
        """Undo `listen`."""
        self.head.leave()
        for undo in self._held:
            undo()
        for module, _, _ in self.tellers:
            for key, hook in list(module._forward_pre_hooks.items()):
                if getattr(hook, "__self__", None) is self:
                    del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__self__", None) is self:
                    del module._forward_hooks[key], module._forward_hooks_always_called[key]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs before the forward of the model, and of each encoder.

        Follows buffers that were moved, replaced or frozen, and tells the deltas that mind it what
        their stack is given.
        """
        if not torch.compiler.is_compiling():
            for name, _weight in self.live:
                self.adapters[name].sync()
            if self._stale:
                self.refresh()
            if torch.is_grad_enabled() and self.stacks:
                self._unstack()
            if module.training and torch.is_grad_enabled():
                self._warn_unled()
                self._hasten(module)
            if module is self.tellers[0].module:
                self.head.tell(args, kwargs)
        told = any(self.adapters[name].told for name, _ in self.live)
        if told or self.rows is not None:
            _, takes, stack = next(t for t in self.tellers if t.module is module)
            given = {**dict(zip(takes, args, strict=False)), **kwargs}
            if self.rows is not None:
                self.rows.tell(given)
            if told:
                self.begin(_batch(given, module.training), stack)

    def begin(self, batch: Batch, stack: str | None) -> None:
        """Tell the live deltas of a stack (None: of all) that mind it what a pass is given."""
        if self.rows is not None:
            self.rows.begin(batch, stack)
            return
        for name, _ in self.live:
            for delta in self.adapters[name].told:
                if stack in (None, delta.site.stack):
                    delta.begin(batch)

    def _hasten(self, module: nn.Module) -> None:
        """Before a pass of a training: find what can be quick, cast all trained numbers at once."""
        if not enabled() or module is not self.tellers[0].module:
            return
        if not self._quick:
            self._quick = True
            quicken(self, module)
        own = next(module.parameters(), None)
        if own is not None and own.is_floating_point() and not self.rows:
            self._cast = [self.adapters[name] for name, _ in self.live]
            dtype = hosts.computed(own)
            for adapter in self._cast:
                adapter.cast(dtype)

    def after(self, module: nn.Module, args: object, output: object) -> None:
        """Runs after the forward of the model: what was cast or kept for it goes."""
        self.readers.rest()
        self.drop.rest()
        for adapter in self._cast:
            adapter.cast(None)
        self._cast = []

    def _unstack(self) -> None:
        """Before training: optimisers change numbers without leaving a trace of it."""
        self.stacks = {}
        if self.rows is not None:
            self.rows.forget()

    def _warn_unled(self) -> None:
        """Warn of methods whose numbers need more than an optimiser while they train."""
        for name, _weight in self.live:
            adapter = self.adapters[name]
            if name in self._warned or not any(p.requires_grad for p in adapter.parameters()):
                continue
            if any(regime.total == 0 for regime in adapter.regimes):
                self._warned.add(name)
                warnings.warn(
                    f"adapter {name!r} ({adapter.recipe}) follows a schedule while it trains, "
                    "which nothing drives here; before training call "
                    "esp.Lifecycle(model, steps=...).follow(optimizer)",
                    stacklevel=2,
                )

    def forward(self, x: Any) -> Any:
        """What is given: a Sequential root calls every child in turn, this one last."""
        return x

    def __deepcopy__(self, memo: dict[int, Any]) -> Graft:
        copy = self.__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update({k: deepcopy(v, memo) for k, v in self.__dict__.items()})
        for adapter in copy.adapters.values():
            adapter.sync()
        copy._stale = True  # modules still being copied lose what was just put into them
        return copy


def _direct(delta: Delta, host: nn.Module) -> bool:
    """Whether the delta's views themselves can stand in for the host's parameters."""
    same = type(delta).effective is Delta.effective
    return same and all(v.dtype == hosts.parameter(host, k).dtype for k, v in delta.t.items())


def _batch(given: dict[str, Any], training: bool) -> Batch:
    _, cache = cache_in(given)
    continuing = begun(cache)
    mask, decoder_mask = given.get("attention_mask"), given.get("decoder_attention_mask")
    return Batch(mask, decoder_mask, continuing, training)


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
    return find(model).get(name)
