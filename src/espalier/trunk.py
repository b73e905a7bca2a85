"""The trunk: the blocks below everything that trains, whose states can be kept and given again.

A block that no delta acts in, and that runs before all that any delta changes, gives the same
states for the same text in every epoch. Which blocks these are is seen in one pass of the model,
by the order in which its modules are called, and so for any model and any method. A `Replay` then
stands in the seats of these blocks: it hands the states that are needed to whoever keeps them, or
gives kept states in their place, and the blocks do not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from espalier.deltas import Delta
from espalier.errors import SettingError
from espalier.graft import Graft, find
from espalier.modules import base_modules
from espalier.seat import Seat

_MADE = "(made)"  # what a block computes besides its states, from their shape alone


@dataclass(frozen=True, slots=True)
class Block:
    """One block as a pass met it.

    Attributes:
        path: Where it stands.
        stack: The stack it belongs to.
        at: Its place in the order of the pass's calls.
        width: Of its states.
        dtype: Of its states.
        rest: What it gives besides its states: for each the argument handed on (its place or its
            name), `_MADE`, or None for nothing. None where it gives its states alone.
    """

    path: str
    stack: str
    at: int
    width: int
    dtype: torch.dtype
    rest: tuple[int | str | None, ...] | None


class State(NamedTuple):
    """States (B, T, width) that training needs: what a block gives, or is `given`."""

    path: str
    given: bool
    stack: str
    width: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Cut:
    """What training leaves of a model as it is.

    Attributes:
        skipped: The blocks that need not run, in the order of their calls.
        states: Those of their states that are needed.
        below: Paths of all modules that decide these states.
        blocks: How many blocks the whole model has.
    """

    skipped: tuple[Block, ...]
    states: tuple[State, ...]
    below: tuple[str, ...]
    blocks: int

    def __str__(self) -> str:
        stacks: dict[str, int] = {}
        for block in self.skipped:
            stacks[block.stack] = stacks.get(block.stack, 0) + 1
        each = " and ".join(f"the {name}'s lowest {count}" for name, count in stacks.items())
        return f"of {self.blocks} blocks {each} run once and no more"


def cut(model: nn.Module, run: Callable[[], object]) -> Cut:
    """What the live adapters leave of the model as it is.

    Args:
        model: A model with adapters.
        run: Runs it once, on at least two texts of different length, in eval mode, without a graph.

    Raises:
        SettingError: Nothing can be left out; names the first place that is in the way.
    """
    graft = find(model)
    deltas = [d for name, _ in graft.live for d in graft.acting(graft.adapters[name])]
    with _told_apart(deltas) as silent:
        first, blocks = _trace(model, graft, run)
    if not blocks:
        raise SettingError(f"{graft.places.notes.model} has no blocks whose states could be kept")
    tapping = [delta for delta in deltas if delta.taps]
    deltas = [delta for delta in deltas if id(delta) not in silent]
    inside = {block.path: block.at for block in blocks}
    starts = [_start(delta, first, inside) for delta in deltas]
    limit = min(starts, default=len(first))
    skipped = [block for block in blocks if block.at < limit]
    if not skipped:
        raise SettingError(_refusal(deltas[starts.index(limit)], blocks[0]))
    for block in skipped:
        _check(block)
    tapped = {path for delta in tapping for path in delta.watches}
    last = {block.stack: block.path for block in skipped}  # of each stack
    lowest: dict[str, Block] = {}
    states: list[State] = []
    for block in skipped:
        lowest.setdefault(block.stack, block)
        about = (block.stack, block.width, block.dtype)
        taps = any(b.path in tapped for b in skipped if b.stack == block.stack)
        if taps and lowest[block.stack] is block:
            states.append(State(block.path, True, *about))
        if block.path in tapped or block.path == last[block.stack]:
            states.append(State(block.path, False, *about))
    below = tuple(path for path, at in first.items() if at < limit)
    return Cut(tuple(skipped), tuple(states), below, len(blocks))


@contextmanager
def _told_apart(deltas: Sequence[Delta]) -> Iterator[set[int]]:
    """The ids of those that only read in the passes meanwhile: what they were to change, they gave.

    An encoder's ladder may be such a one, which its decoder's goes on from.
    """
    silent = {id(delta) for delta in deltas if delta.taps}

    def after(delta: Delta, t: Any, x: Tensor, y: Tensor, training: bool) -> Tensor:
        given = type(delta).after(delta, t, x, y, training)
        if given is not y:
            silent.discard(id(delta))
        return given

    tapping = [delta for delta in deltas if id(delta) in silent]
    for delta in tapping:
        delta.__dict__["after"] = partial(after, delta)
    try:
        yield silent
    finally:
        for delta in tapping:
            del delta.__dict__["after"]


def _start(delta: Delta, first: Mapping[str, int], blocks: Mapping[str, int]) -> int:
    """When, in the order of calls, a delta first changes or reads what no longer is there."""
    if delta.embeds:
        return -1
    found = []
    for path in (delta.site.path, *delta.watches):
        own = path == delta.site.path
        if delta.taps and path in blocks:
            if own:
                found.append(blocks[path] + 1)  # it acts on what the block gives
            continue
        found.append(_called(path, first, blocks))
    return min(found)


def _called(path: str, first: Mapping[str, int], blocks: Mapping[str, int]) -> int:
    """When a module first runs; one in a block with the block, one never called with its owner."""
    parts = path.split(".")
    around = [".".join(parts[:end]) for end in range(len(parts), -1, -1)]
    block = next((name for name in around if name in blocks), None)
    return blocks[block] if block else next(first[name] for name in around if name in first)


def _refusal(delta: Delta, block: Block) -> str:
    place = delta.site.path or "the model's root"
    what = "puts words among those of the text" if delta.embeds else f"acts at {place}"
    where = "in the first block" if _within(delta.site.path, block.path) else "below the blocks"
    return (
        f"no block can be left out: {type(delta).__name__} {what}, {where}, so that every block's "
        f"states change in training (the first is {block.path}). Let the method act in upper "
        "layers only (sites='block@last2', 'attention.q@last4'), train a head alone, or take a "
        "method that reads the states and leaves them as they are"
    )


def _within(path: str, block: str) -> bool:
    return path == block or path.startswith(block + ".")


def _check(block: Block) -> None:
    """Refuse a block whose states or whose other results cannot be given again."""
    if block.width == 0:
        raise SettingError(f"{block.path} gives no states (B, T, width) that could be kept")
    if block.rest is not None and "" in block.rest:
        raise SettingError(
            f"{block.path} gives more than its states, different for each text, and no cache "
            "keeps that"
        )


# ------------------------------------------------------------------------------- one pass, watched


def _trace(
    model: nn.Module, graft: Graft, run: Callable[[], object]
) -> tuple[dict[str, int], list[Block]]:
    """When each module was first called, by path, and the blocks in the order of their calls."""
    modules = base_modules(model)
    stacks = {site.path: site.stack for site in graft.places.whole if site.role == "block"}
    first: dict[str, int] = {}
    found: dict[str, Block] = {}

    def enter(path: str, module: nn.Module, args: Any) -> None:
        first.setdefault(path, len(first))

    def leave(path: str, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if path in found:
            raise SettingError(
                f"{path} runs several times in one pass, so no states are its own; a model whose "
                "layers share one block cannot leave blocks out"
            )
        found[path] = _met(path, stacks[path], first[path], args, kwargs, result)

    hooks: list[RemovableHandle] = []
    for path, module in modules.items():
        hooks.append(module.register_forward_pre_hook(partial(enter, path)))
        if path in stacks:
            hooks.append(module.register_forward_hook(partial(leave, path), with_kwargs=True))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return first, sorted(found.values(), key=lambda block: block.at)


def _met(
    path: str, stack: str, at: int, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> Block:
    whole = result if isinstance(result, tuple) else (result,)
    y, rest = whole[0], whole[1:]
    fits = isinstance(y, Tensor) and y.dim() == 3
    given = {**dict(enumerate(args)), **kwargs}
    width, dtype = (y.shape[-1], y.dtype) if fits else (0, torch.float32)
    how = tuple(_whence(part, given) for part in rest) if isinstance(result, tuple) else None
    return Block(path, stack, at, width, dtype, how)


def _whence(part: Any, given: Mapping[int | str, Any]) -> int | str | None:
    """Where something that a block gives comes from; "" where it is each text's own."""
    if part is None:
        return None
    handed = next((key for key, value in given.items() if value is part), None)
    if handed is not None:
        return handed
    return _MADE if isinstance(part, Tensor) and part.dim() > 1 and len(part) == 1 else ""


# ----------------------------------------------------------------------------- in the blocks' place


class _Enough(Exception):
    """All states are noted: the rest of the pass is not needed."""


class Replay:
    """Stands in the seats of the blocks that need not run, until `leave`.

    Between passes told to record or to replay, the blocks run as ever.
    """

    def __init__(self, model: nn.Module, what: Cut) -> None:
        self.graft, self.cut = find(model), what
        self._sink: Callable[[State, Tensor], None] | None = None
        self._source: Callable[[State, Tensor], Tensor] | None = None
        self._waiting: set[State] = set()
        self._before: list[tuple[Seat, Any, bool, Any]] = []
        outputs = {state.path: state for state in what.states if not state.given}
        inputs = {state.path: state for state in what.states if state.given}
        modules = base_modules(model)
        for block in what.skipped:
            seat = self.graft.seat(block.path, modules[block.path])
            self._before.append((seat, seat.inner, seat.checkpointed, seat.around))
            own = seat.inner or partial(type(seat.host).forward, seat.host)
            seat.inner = partial(self._through, block, outputs.get(block.path), own)
            seat.checkpointed = False  # what is not run keeps nothing to run again
            if block.path in inputs:
                seat.around = partial(self._into, inputs[block.path], seat.around)

    def leave(self) -> None:
        """Give the seats their blocks back, and take away those that hold nothing else."""
        for seat, inner, checkpointed, around in self._before:
            seat.inner, seat.checkpointed, seat.around = inner, checkpointed, around
            empty = not (seat.deltas or seat.watchers or seat.around)
            if empty and self.graft.seats.get(seat.path) is seat and seat.leave():
                del self.graft.seats[seat.path]
        self._before = []

    @contextmanager
    def recording(self, sink: Callable[[State, Tensor], None]) -> Iterator[None]:
        """A pass in which the sink is told each state needed; it ends with the last of them."""
        self._sink, self._waiting = sink, set(self.cut.states)
        try:
            with suppress(_Enough):
                yield
        finally:
            self._sink = None

    @contextmanager
    def replaying(self, source: Callable[[State, Tensor], Tensor]) -> Iterator[None]:
        """Passes, and what follows from them, with states from the source.

        The source is told which states, and given the block's live input for shape and device.
        """
        self._source = source
        try:
            yield
        finally:
            self._source = None

    def _note(self, state: State, tensor: Tensor) -> None:
        assert self._sink is not None
        self._sink(state, tensor)
        self._waiting.discard(state)
        if not self._waiting:
            raise _Enough

    def _into(
        self,
        state: State,
        around: Callable[..., Any] | None,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The lowest block of a stack, whose input is kept: everyone is told the kept one."""
        name, x = _given(args, kwargs)
        if self._source is not None:
            kept = self._source(state, x)
            args, kwargs = ((kept, *args[1:]), kwargs) if args else (args, {**kwargs, name: kept})
        elif self._sink is not None:
            self._note(state, x)
        return around(call, args, kwargs) if around else call(args, kwargs)

    def _through(
        self,
        block: Block,
        state: State | None,
        own: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """A block's forward."""
        if self._source is None:
            result = own(*args, **kwargs)
            if self._sink is not None and state is not None:
                self._note(state, result if isinstance(result, Tensor) else result[0])
            return result
        _, x = _given(args, kwargs)
        y = x if state is None else self._source(state, x)
        if block.rest is None:
            return y
        made: Sequence[Any] = ()
        if _MADE in block.rest:
            with torch.no_grad():
                made = own(*_one(args, len(x)), **_one(kwargs, len(x)))[1:]
        handed = {**dict(enumerate(args)), **kwargs}
        rest = [
            made[i] if key == _MADE else None if key is None else handed[key]
            for i, key in enumerate(block.rest)
        ]
        return (y, *rest)


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Tensor]:
    """A block's input, with its name where it has one."""
    return ("", args[0]) if args else next(iter(kwargs.items()))


def _one(value: Any, rows: int) -> Any:
    """Arguments with the first text alone; what is made from shapes is the same for all.

    Caches of keys are left out: nothing that is skipped writes to one.
    """
    if isinstance(value, Tensor):
        return value[:1] if value.dim() > 1 and len(value) == rows else value
    if isinstance(value, tuple):
        return tuple(_one(part, rows) for part in value)
    if isinstance(value, dict):
        return {key: _one(part, rows) for key, part in value.items()}
    return None if hasattr(value, "get_seq_length") else value
