"""The seat: where deltas act. One bound method in a host's instance `forward`.

The host keeps its class, its keys and whatever forward it had, which becomes the seat's inner
call. Tried against wrapping, parametrize, hooks and class swap, it alone compiles without graph
breaks also when put on after `torch.compile`, survives accelerate's hooks, and leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from espalier import hosts
from espalier.deltas import Call, Delta
from espalier.fast import seated as fused
from espalier.fast.decoding import served
from espalier.fast.quick import Quick, taken
from espalier.pieces import Live

if TYPE_CHECKING:
    from espalier.graft import Graft


class Seat:
    """The deltas of one host, by adapter.

    Attributes:
        path: The host's path.
        host: The module whose input or output they change.
        deltas: For each adapter's name its deltas here, in the order in which they act.
        watchers: For each adapter's name the deltas elsewhere that mind this host's calls.
        around: What else happens around a call here: around(call, args, kwargs) gives the output.
        quick: What may compute the host's own output in training, with less memory.
    """

    __slots__ = (
        *("around", "checkpointed", "deltas", "graft", "host", "inner", "path", "quick", "scaled"),
        "watchers",
    )

    def __init__(self, path: str, host: nn.Module, graft: Graft) -> None:
        self.path = path
        self.host = host
        self.graft = graft
        self.inner = host.__dict__.get("forward")  # another library's forward on this instance
        self.deltas: dict[str, list[Delta]] = {}
        self.watchers: dict[str, list[Delta]] = {}
        self.around: Callable[..., Any] | None = None
        self.quick: Quick | None = None
        self.scaled = hosts.scaled(host)
        self.checkpointed = hosts.checkpointed(host)
        host.__dict__["forward"] = self.forward  # setting a module's attribute takes ten times that

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's output, changed by the deltas of the active adapters in turn."""
        if not (self.deltas or self.watchers or self.around or self.checkpointed):
            return self._own(type(self.host).forward, args, kwargs)  # it stands in alone
        if self.around is not None:
            return self.around(self._run, args, kwargs)
        again = self.checkpointed and self.host.gradient_checkpointing and self.host.training
        if again and not self._tapped:
            return self._checkpointed(args, kwargs)
        return self._run(args, kwargs)

    @property
    def _tapped(self) -> bool:
        """Whether all that follows reads this host's output detached: it needs no graph then."""
        return any(
            delta.taps and weight == 1
            for name, weight in self.graft.live
            for delta in self.watchers.get(name, ())
        )

    def _checkpointed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The host's own forward, which checkpoints itself, with the deltas in the checkpoint."""
        host: Any = self.host
        function = host._gradient_checkpointing_func
        host._gradient_checkpointing_func = partial(self._checkpoint, function)
        try:
            return self._inner(args, kwargs)
        finally:
            host._gradient_checkpointing_func = function

    def _checkpoint(self, function: Callable[..., Any], body: partial[Any], *args: Any) -> Any:
        return function(partial(self._within, body), *args)

    def _within(self, body: partial[Any], *args: Any) -> Any:
        """What is checkpointed, and run again in the backward pass."""
        inner, self.inner = self.inner, partial(body.func, *body.args)
        try:
            return self._run(args, body.keywords)
        finally:
            self.inner = inner

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        graft = self.graft
        if graft.rows is not None:
            return graft.rows.run(self, args, kwargs)
        if (fast := served(self, args, kwargs)) is not None:
            return fast(args[0])
        live = self.acting(graft.live)
        if not self.watchers:
            return self._changed(live, args, kwargs) if live else self._inner(args, kwargs)
        try:
            result = self._changed(live, args, kwargs) if live else self._inner(args, kwargs)
            self._tell(live, args, kwargs, result)
            return result
        finally:  # the end of a call around a delta's own ends what the delta has seen
            for delta in self._watching(within=True):
                delta.seen.clear()

    def acting(self, live: Live) -> list[tuple[Delta, float]]:
        """The deltas here of these adapters, and their weights."""
        return [(delta, weight) for name, weight in live for delta in self.deltas.get(name, ())]

    def _watching(self, within: bool) -> list[Delta]:
        """The live deltas that mind this host's calls and stand within it, or do not."""
        return [
            delta
            for name, _ in self.graft.live
            for delta in self.watchers.get(name, ())
            if delta.site.path.startswith(self.path + ".") == within
        ]

    def _changed(
        self, live: list[tuple[Delta, float]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        stood_in = [delta for delta, _ in live if delta.replaces]
        if not stood_in:
            return self._acted(live, args, kwargs)
        own = self.host.__dict__
        for delta in stood_in:
            held = {name: hosts.parameter(self.host, name) for name in delta.parameters}
            for name, value in delta.effective(delta.t, held, self.host.training).items():
                own[name] = value.to(held[name].dtype)
        try:
            return self._acted([pair for pair in live if not pair[0].replaces], args, kwargs)
        finally:
            for name in [name for delta in stood_in for name in delta.parameters]:
                own.pop(name, None)

    def _acted(
        self, live: list[tuple[Delta, float]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The host's output with every change; trained copies stand in for its parameters now."""
        if fused.takes(self, live, args, kwargs):
            return fused.output(self, live, args[0])
        try:
            for delta, weight in live:
                if type(delta).before is not Delta.before:
                    args, kwargs = self._before(delta, weight, args, kwargs)
            result = self._inner(args, kwargs)
            if not live:
                return result
            y = first(result)
            x = argument(args, kwargs)
            for delta, weight in live:
                if type(delta).after is not Delta.after:
                    if delta.watches and self.path in delta.watches:  # else blocks share a graph
                        delta.seen[self.path] = self._call(live, args, kwargs, y)
                    y = self._after(delta, weight, x, y)
            return y if isinstance(result, Tensor) else (y, *result[1:])
        finally:  # also when a checkpoint's recomputation ends in here
            for delta, _ in live:
                delta.seen.clear()

    def _inner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._tapped:
            return self._own(type(self.host).forward, args, kwargs)
        own: Any = type(self.host).forward
        with torch.no_grad():
            return self._own(own.__wrapped__ if self.checkpointed else own, args, kwargs)

    def _own(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        if self.quick is not None:
            result = taken(self.quick, self.host, args, kwargs)
            if result is not None:
                return result
        return forward(self.host, *args, **kwargs)

    def _tell(
        self,
        live: list[tuple[Delta, float]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        """Leave this call with the deltas elsewhere that mind it."""
        for delta in self._watching(within=False):
            if delta.site.path != self.path:
                delta.seen[self.path] = self._call(live, args, kwargs, first(result))

    def _call(
        self,
        live: list[tuple[Delta, float]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        y: Tensor,
    ) -> Call:
        again = partial(self._again, live, args[1:], kwargs)
        return Call(argument(args, kwargs), y, again, args, kwargs)

    def _again(
        self,
        live: list[tuple[Delta, float]],
        rest: tuple[Any, ...],
        kwargs: dict[str, Any],
        x: Tensor,
    ) -> Tensor:
        """The host, deltas and all, applied to another input; told as its latest call."""
        args = (x, *rest)
        result = self._changed(live, args, kwargs) if live else self._inner(args, kwargs)
        self._tell(live, args, kwargs, result)
        return first(result)

    def _before(
        self, delta: Delta, weight: float, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = argument(args, kwargs)
        changed = delta.before(hosts.tensors(delta, x, self.host), x, self.host.training)
        if weight != 1.0:
            changed = x + weight * (changed - x)
        return instead(changed, args, kwargs)

    def _after(self, delta: Delta, weight: float, x: Tensor, y: Tensor) -> Tensor:
        enter = delta.site.enter
        if enter in delta.seen:
            x = delta.seen[enter].x
        if x.is_floating_point() and x.dtype != y.dtype:
            x = x.to(y.dtype)
        t = hosts.tensors(delta, y, self.host)
        if weight != 1.0 and delta.gates:
            t["gate"] = y.new_full((), weight)
        rows = delta.site.rows
        before = y if rows is None else rows.take(y)
        if self.scaled:
            gain = hosts.gain(self.host)
            after = delta.after(t, x, before / gain, self.host.training) * gain
        else:
            after = delta.after(t, x, before, self.host.training)
        if weight != 1.0 and not delta.gates:
            after = before + weight * (after - before)
        return after if rows is None else rows.place(y, after)

    def leave(self) -> bool:
        """Give the host its earlier forward back; False if someone else's stands over ours."""
        if self.host.__dict__.get("forward") != self.forward:
            return False
        if self.inner is None:
            del self.host.__dict__["forward"]
        else:
            self.host.forward = self.inner
        return True


def argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a module was given: its first argument."""
    return args[0] if args else next(iter(kwargs.values()))


def instead(
    x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with x for its first argument."""
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): x}


def first(result: Any) -> Tensor:
    """What a module gave: its output, or the first of several."""
    return result if isinstance(result, Tensor) else result[0]
