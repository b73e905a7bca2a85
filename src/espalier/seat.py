"""The seat: where deltas act. One bound method in a host's instance `forward`.

The host keeps its class, its keys and whatever forward it had, which becomes the seat's inner
call. Tried against wrapping, parametrize, hooks and class swap, it alone compiles without graph
breaks also when put on after `torch.compile`, survives accelerate's hooks, and leaves no trace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from espalier import hosts
from espalier.deltas import Delta

if TYPE_CHECKING:
    from espalier.graft import Graft
    from espalier.places import Rows


class Seat:
    """The deltas of one host, by adapter.

    Attributes:
        host: The module whose output they change.
        deltas: For each adapter's name its deltas here, in the order in which they act.
    """

    __slots__ = ("deltas", "graft", "host", "inner", "scaled")

    def __init__(self, host: nn.Module, graft: Graft) -> None:
        self.host = host
        self.graft = graft
        self.inner = host.__dict__.get("forward")  # another library's forward on this instance
        self.deltas: dict[str, list[Delta]] = {}
        self.scaled = hosts.scaled(host)
        host.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's output, changed by the deltas of the active adapters in turn."""
        live = [
            (delta, weight)
            for name, weight in self.graft.live
            for delta in self.deltas.get(name, ())
        ]
        stood_in = [delta for delta, _ in live if delta.replaces]
        y = self._with(stood_in, args, kwargs) if stood_in else self._inner(args, kwargs)
        if len(live) == len(stood_in):
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        if x.is_floating_point() and x.dtype != y.dtype:
            x = x.to(y.dtype)
        for delta, weight in live:
            if not delta.replaces:
                y = self._after(delta, weight, x, y)
        return y

    def _inner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.host).forward(self.host, *args, **kwargs)

    def _after(self, delta: Delta, weight: float, x: Tensor, y: Tensor) -> Tensor:
        t = {
            key: v if v.dtype == y.dtype and v.device == y.device else v.to(y.device, y.dtype)
            for key, v in delta.t.items()
        }
        rows = delta.site.rows
        before = y if rows is None else take(y, rows)
        if self.scaled:
            gain = hosts.gain(self.host)
            after = delta.after(t, x, before / gain, self.host.training) * gain
        else:
            after = delta.after(t, x, before, self.host.training)
        if weight != 1.0:
            after = before + weight * (after - before)
        return after if rows is None else place(y, rows, after)

    def _with(self, deltas: list[Delta], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The host's own forward with trained copies, cast to its type, in place of parameters."""
        own = self.host.__dict__
        names = [name for delta in deltas for name in delta.t]
        for delta in deltas:
            for name, value in delta.t.items():
                own[name] = value.to(hosts.parameter(self.host, name).dtype)
        try:
            return self._inner(args, kwargs)
        finally:
            for name in names:
                own.pop(name, None)

    def leave(self) -> bool:
        """Give the host its earlier forward back; False if someone else's stands over ours."""
        if self.host.__dict__.get("forward") != self.forward:
            return False
        if self.inner is None:
            del self.host.__dict__["forward"]
        else:
            self.host.forward = self.inner
        return True


def take(y: Tensor, rows: Rows) -> Tensor:
    """The features of y (…, groups·width) that belong to `rows`: (…, groups·(stop − start))."""
    if rows.groups == 1:
        return y[..., rows.start : rows.stop]
    return y.unflatten(-1, (rows.groups, rows.width))[..., rows.start : rows.stop].flatten(-2)


def place(y: Tensor, rows: Rows, part: Tensor) -> Tensor:
    """The output with the features of `rows` replaced by `part`; y itself is not written to."""
    whole = y.unflatten(-1, (rows.groups, rows.width))
    inner = part.unflatten(-1, (rows.groups, rows.stop - rows.start))
    return torch.cat((whole[..., : rows.start], inner, whole[..., rows.stop :]), dim=-1).flatten(-2)
