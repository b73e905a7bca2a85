"""Where a model's head answers with logits that are computed when they are used (deferred.py).

A model that is given labels makes its loss itself and seldom needs logits for anything else. So in
a pass with labels and gradients the head hands on what it would have read. Whether that is right
is found out by asking: once for what is active the head, deltas and all, runs on one row, and the
graph of what it gives must lead to nothing but its input and the numbers known to train in it.

Where it is not, and under `torch.compile` of the whole model, logits are logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from espalier import hosts
from espalier.deltas import Delta
from espalier.errors import AdapterError
from espalier.fast.deferred import Logits, Source
from espalier.fast.switch import enabled, ordinary
from espalier.modules import base_modules, unwrap

if TYPE_CHECKING:
    from collections.abc import Callable

    from espalier.graft import Graft
    from espalier.seat import Seat


class _Known(NamedTuple):
    """What a head gives: how many words, and in which type."""

    width: int
    dtype: torch.dtype


class Head:
    """The seat of a model's head over words, and whether the pass that runs is to defer logits.

    Attributes:
        seat: The seat; None where the model has no such head.
        always: How many `deferred_logits` are entered.
    """

    def __init__(self, model: nn.Module, graft: Graft) -> None:
        self.graft = graft
        self.seat: Seat | None = None
        self.always = 0
        self._labelled = False
        self._known: dict[Any, _Known | None] = {}
        self._makes_loss = "labels" in graft.tellers[0].takes
        found = _words(model, graft)
        if found is not None:
            self.seat = graft.seat(*found)
            self.seat.around = self._around

    def leave(self) -> None:
        """Take what stands at the head off it; its seat goes too, if nothing else is there."""
        seat = self.seat
        if seat is None:
            return
        seat.around = None
        if not (seat.deltas or seat.watchers) and seat.leave():
            self.graft.seats.pop(seat.path, None)

    def forget(self) -> None:
        """Told that what is active, or its numbers, may have changed."""
        self._known = {}

    def tell(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Told what the model is given, before each of its passes."""
        labels = kwargs.get("labels")
        if labels is None and self._makes_loss:
            at = self.graft.tellers[0].takes.index("labels")
            labels = args[at] if at < len(args) else None
        self._labelled = isinstance(labels, Tensor)

    def _around(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if torch.compiler.is_compiling() or not self._wanted(args, kwargs):
            return call(args, kwargs)
        self._labelled = False  # once in a pass
        (x,) = args
        deferred = self._deferred(partial(_output, call), x)
        return call(args, kwargs) if deferred is None else deferred

    def _wanted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if not (self._labelled or self.always) or not (enabled() and torch.is_grad_enabled()):
            return False
        if len(args) != 1 or kwargs or self.graft.rows is not None:
            return False
        x = args[0]
        return ordinary(x) and x.dim() > 1 and x.is_floating_point() and x.numel() > 0

    def _deferred(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Logits | None:
        """Logits of x for later; None where they cannot be made in chunks."""
        assert self.seat is not None
        live = [delta for delta, _ in self._acting()]
        if not all(_by_rows(delta) for delta in live) or not _stays(self.seat.host):
            return None
        trained = self._trained(live)
        if not (x.requires_grad or trained):
            return None
        device = x.device.type
        cast = hosts.autocast_type(device)
        kind = x.dtype, cast
        if kind not in self._known:
            self._known[kind] = self._trial(run, x, trained)
        known = self._known[kind]
        if known is None:
            return None
        weight = None
        plain = not live and not trained and cast is None
        if plain and hosts.multiplies(self.seat.host, x):
            dense, bias = hosts.operands(self.seat.host, x.dtype)
            weight = (dense, bias) if isinstance(dense, Tensor) else None
        kept = _Pass(self, run, device, trained)
        return Logits(Source(kept, tuple(trained), known.width, weight), x, known.dtype)

    def _trial(
        self, run: Callable[[Tensor], Tensor], x: Tensor, trained: list[Tensor]
    ) -> _Known | None:
        """What the head gives for one row of x; None where it reads more than it was given."""
        assert self.seat is not None
        host = self.seat.host
        row = x.detach().reshape(1, -1, x.shape[-1])[:, :1].clone().requires_grad_()
        training, host.training = host.training, False  # no dropout: it would draw a number
        try:
            made = run(row)
        finally:
            host.training = training
        if made.shape[:-1] != row.shape[:-1] or not _reads_only(made, [row, *trained]):
            return None
        return _Known(made.shape[-1], made.dtype)

    def _acting(self) -> list[tuple[Delta, float]]:
        """The live deltas here and their weights."""
        assert self.seat is not None
        return self.seat.acting(self.graft.live)

    def _copies(self) -> list[Delta]:
        """The live trained copies that stand in for the head's own parameters."""
        assert self.seat is not None
        pairs = [pair for name, _ in self.graft.live for pair in self.graft.stand_ins[name]]
        return [delta for module, delta in pairs if module is self.seat.host]

    def _trained(self, live: Iterable[Delta]) -> list[Tensor]:
        """The tensors of the head that train: its own, its deltas' and its trained copies."""
        assert self.seat is not None
        tensors = [
            *self.seat.host.parameters(),
            *(t for delta in (*live, *self._copies()) for t in delta.t.values()),
        ]
        return list({id(t): t for t in tensors if t.requires_grad}.values())

    def state(self, trained: bool) -> tuple[Any, ...]:
        """What must be as it was when logits are computed after their pass."""
        seat, graft = self.seat, self.graft
        assert seat is not None
        tensors = [*seat.host.parameters()]
        if trained:
            adapters = (graft.adapters[name] for name, _ in graft.live)
            tensors += [p for adapter in adapters for p in adapter.runs.values()]
        return self._acting(), self._copies(), [(t.data_ptr(), t._version) for t in tensors]


class _Pass:
    """The head as it was when its pass came by: the same numbers, under the same autocast."""

    def __init__(
        self, head: Head, run: Callable[[Tensor], Tensor], device: str, trained: list[Tensor]
    ) -> None:
        self.head, self.inner, self.trains = head, run, bool(trained)
        self.state = head.state(self.trains)
        cast = hosts.autocast_type(device)
        self.autocast = partial(torch.autocast, device, cast, enabled=cast is not None)

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.head.state(self.trains) != self.state:
            raise AdapterError(
                "the logits of an earlier training pass were never computed, and the head has "
                "changed since. Read logits before the optimiser's step, or run the pass within "
                "`with esp.plain_paths():`"
            )
        with self.autocast():
            return self.inner(hidden)


@contextmanager
def deferred_logits(model: nn.Module) -> Iterator[None]:
    """Within it a model's logits are computed when they are used, also where it gets no labels.

    For loops with a loss of their own. `F.cross_entropy` on such logits, (N, V) with labels (N,),
    drops ignored tokens and takes the rest in chunks, so that no logits (N, V) ever exist; labels
    may be smoothed. Every other function computes the logits first. A pass that is given labels
    needs nothing: the loss of the model is made so anyway.

    Args:
        model: A model with adapters.

    Raises:
        AdapterError: Nothing is attached to it.

    Example:
        with esp.deferred_logits(model):
            logits = model(input_ids).logits  # (B, T, V)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    """
    from espalier.graft import find

    head = find(model).head
    head.always += 1
    try:
        yield
    finally:
        head.always -= 1


def _words(model: nn.Module, graft: Graft) -> tuple[str, nn.Module] | None:
    """Path and module of the head over words, where it is one linear layer."""
    try:
        module = unwrap(model).get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None
    modules = base_modules(model)
    for site in graft.places.whole if module is not None else ():
        if site.kind in ("linear", "conv1d") and modules[site.path] is module:
            return site.path, modules[site.path]
    return None


def _output(call: Callable[..., Any], x: Tensor) -> Tensor:
    return call((x,), {})


def _by_rows(delta: Delta) -> bool:
    """Whether a delta changes every token by itself, whatever stands beside it."""
    return not (delta.watches or delta.taps or type(delta).begin is not Delta.begin)


def _stays(host: nn.Module) -> bool:
    """Whether a host's weights are where they are also after its call."""
    hook = getattr(host, "_hf_hook", None)
    if getattr(hook, "offload", False) or "FSDP" in type(host).__name__:
        return False
    return not any(hasattr(p, "ds_id") or hasattr(p, "placements") for p in host.parameters())


def _reads_only(result: Tensor, known: Iterable[Tensor]) -> bool:
    """Whether a result's graph leads to these tensors alone, of all that asks for gradients."""
    edges = {(e.node, e.output_nr) for e in map(get_gradient_edge, known)}
    waiting: list[tuple[Any, int]] = (
        [] if result.grad_fn is None else [(result.grad_fn, result.output_nr)]
    )
    seen: set[Any] = set()
    while waiting:
        edge = waiting.pop()
        node = edge[0]
        if edge in edges or edge in seen or node is None:
            continue
        seen.add(edge)
        if not node.next_functions:  # a leaf, or what made a view of an adapter's numbers
            return False
        waiting += node.next_functions
    return True
