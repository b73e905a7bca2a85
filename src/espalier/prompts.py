"""The input port: soft prompts, words of no vocabulary, stand among the words of a text.

They do so only inside the *stack*, the module that embeds the text and runs it through its blocks.
On the way in, ids, mask, positions and types are widened, prompts standing after left padding;
where words are embedded, learned rows take their places; on the way out these places are cut away.
So what lies around the stack (heads, losses, pooling, generation with all its processors and
limits) sees the text alone, and what lies within (masks, positions, caches) is the model's own. A
cache holds the prompts as it holds words; masks and positions given beside it are the text's.

The encoder before a decoder keeps the places of its prompts: cross attention reads them. In images,
rows stand after the first patch, from the first block on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from espalier.caches import begun, cache_in, words_in
from espalier.deltas import Batch, Delta
from espalier.errors import AdapterError
from espalier.modules import base_modules
from espalier.plain.prompt import special_ids
from espalier.routes import names, positions, route
from espalier.spread import Spread, alike, boundary, bounds, spread

if TYPE_CHECKING:
    from espalier.graft import Graft
    from espalier.places import Sites

Call = Callable[[tuple[Any, ...], dict[str, Any]], Any]
_PREPARE = "prepare_inputs_for_generation"


class Prompts:
    """The prompts of one model, by adapter, and the way in and out of its stack.

    Attributes:
        deltas: For each adapter's name its deltas that embed.
        route: The modules by which they enter and leave.
    """

    def __init__(self, model: nn.Module, places: Sites, delta: Delta, graft: Graft) -> None:
        self.deltas: dict[str, list[Delta]] = {}
        self.route = route(model, places, delta)
        self.model, self.graft, self.side = model, graft, delta.site.stack
        modules = base_modules(model)
        self.stack = modules[self.route.stack]
        self.names = names(self.stack)
        self.read = names(modules[self.route.reader]) if self.route.reader is not None else ()
        self.limit = positions(model, modules, places, self.route.stack)
        self.filler, self.separators = _ids_of(model)
        self.live: tuple[Delta, ...] = ()  # while the stack runs
        self.spread: Spread | None = None
        self.pending, self.texts = False, 0  # words wait for the embedding of so many texts
        self.arounds: dict[str, Callable[..., Any]] = {
            self.route.stack: self._through_stack,
            self.route.door: self._into_first if self.route.images else self._through_words,
        }
        for path, around in (
            (self.route.body, self._out_of_body),
            (self.route.pooler, self._into_pooler),
            (self.route.reader, self._into_reader),
        ):
            if path is not None and path != self.route.stack:
                self.arounds[path] = around
        for path, around in self.arounds.items():
            graft.seat(path, modules[path]).around = around
        self._enter_generation()

    def leave(self) -> None:
        """Take everything off the model that the first prompt put there."""
        for path in self.arounds:
            self.graft.seats[path].around = None
        own = self.model.__dict__.get(_PREPARE)
        if isinstance(own, partial) and own.func == self.prepare:
            del self.model.__dict__[_PREPARE]

    @property
    def length(self) -> int:
        """Words that the live adapters put beside the text."""
        return sum(sum(delta.gaps) for delta in self._acting())

    def _acting(self) -> Iterator[Delta]:
        rows = self.graft.rows  # all rows of a batch have the same places
        for name, _ in self.graft.live if rows is None else rows.lives[0]:
            yield from self.deltas.get(name, ())

    # ------------------------------------------------------------------------- through the stack

    def _through_stack(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.live = tuple(self._acting())
        if not self.live:
            return call(args, kwargs)
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        try:
            if not self.route.images:
                self._widen(given)
            result = call((), given)
            if self.spread is None or self.route.reader is not None:
                return result
            return _cut(result, self.spread)
        finally:
            self.live, self.spread, self.pending = (), None, False

    def _widen(self, given: dict[str, Any]) -> None:
        """Make room for the prompts in what the stack is given, or note that a cache has them."""
        ids, features, mask = (
            given.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask")
        )
        words = ids if ids is not None else features
        if words is None:
            return  # the model says what is missing
        length, size = self.length, words.shape[1]
        held = _held(given, length, size)
        self._check(length, size, held, mask)
        if held:
            self._go_on(given, length, mask)
            return
        self.spread = self._spread(given, size, words.device)
        self.pending, self.texts = ids is not None, len(words)
        for name, value in given.items():
            given[name] = self._widened(name, value, words.shape[:2])
        self._tell(given.get("attention_mask"), continuing=False)

    def _widened(self, name: str, value: Any, shape: torch.Size) -> Any:
        """One argument of the stack with room for the prompts; (B, T, …) alone needs any."""
        here = self.spread
        assert here is not None
        if not isinstance(value, Tensor):
            return value
        if name == "input_ids":
            return here.fill(value, self.filler)
        if name == "attention_mask":
            return here.fill(value, 1)
        if name == "position_ids":
            return here.positions(value)
        if name == "inputs_embeds":
            wide = here.repeat(value)
            return here.put(wide, self._rows(wide))
        if value.shape[:2] == shape and not name.startswith("encoder_"):
            return here.repeat(value)  # types, languages, boxes: one for each word
        return value

    def _spread(self, given: Mapping[str, Any], size: int, device: torch.device) -> Spread:
        gaps = tuple(sum(delta.gaps[i] for delta in self.live) for i in range(3))
        before, between, after = gaps
        mask, ids, types = (
            given.get(name) for name in ("attention_mask", "input_ids", "token_type_ids")
        )
        if mask is None:
            if not (between or after):
                return alike(before, size, 0, device)
            rows = 1 if ids is None else len(ids)
            mask = torch.ones(rows, size, dtype=torch.long, device=device)
        start, end = bounds(mask)
        middle = boundary(start, end, ids, types, self.separators) if between else start
        return spread((before, between, after), size, start, middle, end)

    def _go_on(self, given: dict[str, Any], length: int, mask: Tensor | None) -> None:
        """The cache has the prompts already: only marks of the text given beside it are widened."""
        if mask is not None:
            given["attention_mask"] = _wide_mask(mask, (length, 0, 0))
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + length
        self._tell(given.get("attention_mask"), continuing=True)

    def _check(self, length: int, size: int, held: int, mask: Any) -> None:
        """Refuse a text too long, or a mask that is not one of its words; `held` are in a cache."""
        text = size + held - (length if held else 0)
        if self.limit is not None and text + length > self.limit:
            raise AdapterError(
                f"a text of {text} tokens and a prompt of {length} make {text + length}, but "
                f"{type(self.model).__name__} has {self.limit} positions; use at most "
                f"{self.limit - length} tokens"
            )
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            why = f"have a row per text, one number per word, not {_shape(mask)}"
        elif mask.shape[1] != text:
            why = f"cover {text} words, those of the text, but has {mask.shape[1]}"
            why += "; was the cache filled while other adapters were active?" if held else ""
        else:
            return
        raise AdapterError(f"a soft prompt is active; attention_mask must then {why}")

    def _tell(self, mask: Tensor | None, continuing: bool) -> None:
        """Deltas of this stack that mind the mask are told of it again: it has more words now."""
        self.graft.begin(Batch(mask, None, continuing, self.stack.training), self.side)

    def _rows(self, like: Tensor) -> Tensor:
        """The live prompts' rows (L, D), or (B, L, D) where texts have their own."""
        rows = self.graft.rows
        if rows is None:
            return self._of(self.live, like)
        parts = [[d for name, _ in live for d in self.deltas.get(name, ())] for live in rows.lives]
        return rows.embedded([self._of(part, like) for part in parts], like)

    def _of(self, deltas: Sequence[Delta], like: Tensor) -> Tensor:
        """The rows (L, D) of some prompts, gap by gap, computed in their own type."""
        rows = [delta.embed(delta.t, self.stack.training) for delta in deltas]
        if len(rows) > 1:
            parts = [part.split(list(delta.gaps)) for part, delta in zip(rows, deltas, strict=True)]
            rows = [part[gap] for gap in range(3) for part in parts]
        return torch.cat(rows).to(like.device, like.dtype)

    # --------------------------------------------------------------- where words come in and out

    def _through_words(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The word embedding: learned rows take their places."""
        y = call(args, kwargs)
        if not self.pending:
            return y
        self.pending = False  # types may be embedded by the same table afterwards
        here = self.spread
        assert here is not None
        if y.dim() != 3 or len(y) != self.texts or y.shape[1] < here.width:
            raise AdapterError(
                f"a soft prompt cannot stand among words embedded as {tuple(y.shape)}: "
                f"({self.texts} texts, {here.width} words, width) is what it can change"
            )
        return here.put(y, self._rows(y))

    def _into_first(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The first block of images: rows enter after the first patch."""
        if not self.live:
            return call(args, kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        if x.dim() != 3 or kwargs.get("attention_mask") is not None:
            raise AdapterError(
                f"a soft prompt cannot stand among patches of shape {tuple(x.shape)}, or beside an "
                "attention_mask of patches"
            )
        here = self.spread = alike(self.length, x.shape[1], 1, x.device)
        wide = here.repeat(x)
        wide = here.put(wide, self._rows(wide))
        if args:
            return call((wide, *args[1:]), kwargs)
        return call(args, {**kwargs, next(iter(kwargs)): wide})

    def _out_of_body(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = call(args, kwargs)
        return result if self.spread is None else _cut(result, self.spread)

    def _into_pooler(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        here = self.spread
        if here is None:
            return call(args, kwargs)
        kept = {name: _narrow(value, here) for name, value in kwargs.items()}
        return call(tuple(_narrow(value, here) for value in args), kept)

    def _into_reader(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The decoder: the mask of the encoder's words also covers its prompts."""
        given = {**dict(zip(self.read, args, strict=False)), **kwargs}
        mask, states = given.get("encoder_attention_mask"), given.get("encoder_hidden_states")
        length = self.length
        if not length or mask is None or states is None:
            return call(args, kwargs)
        if mask.dim() == 2 and states.shape[1] == mask.shape[1] + length:
            gaps = [sum(d.gaps[i] for d in self._acting()) for i in range(3)]
            given["encoder_attention_mask"] = _wide_mask(mask, (gaps[0] + gaps[1], 0, gaps[2]))
        return call((), given)

    # ------------------------------------------------------------------------------- generation

    def _enter_generation(self) -> None:
        """Where a cache is counted in words of the text, it is told of the prompts in it."""
        inner = getattr(self.model, _PREPARE, None)
        if inner is None or self.route.reader is not None or self.route.images:
            return
        if _PREPARE in self.model.__dict__:
            return  # someone else's stands there; only going on from a cache needs ours
        ours = partial(self.prepare)
        ours.__signature__ = inspect.signature(inner)  # type: ignore[attr-defined]
        self.model.__dict__[_PREPARE] = ours

    def prepare(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's own preparation of a step, where a cache given to `generate` is continued.

        How many words are new is counted there as those of the text less those of the cache.
        """
        new = kwargs.get("next_sequence_length")
        if new is not None and kwargs.get("is_first_iteration"):
            kwargs = {**kwargs, "next_sequence_length": new + self.length}
        return getattr(type(self.model), _PREPARE)(self.model, *args, **kwargs)


def _cut(result: Any, here: Spread) -> Any:
    """What a module gave, its hidden states without the prompts' places."""
    first = result if isinstance(result, Tensor) else result[0]
    if first.shape[1] not in (here.width, here.text.shape[1]):
        raise AdapterError(
            f"a soft prompt cannot be told from the text again: {here.width} words went in and "
            f"{first.shape[1]} places came out; this model changes the length of its input"
        )
    return _narrow(result, here)


def _narrow(value: Any, here: Spread) -> Any:
    if isinstance(value, Tensor):
        return here.cut(value) if value.dim() == 3 and value.shape[1] == here.width else value
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return type(value)(_narrow(one, here) for one in value)
    if isinstance(value, Mapping) and hasattr(value, "to_tuple"):  # transformers' outputs
        for name in list(value):
            value[name] = _narrow(value[name], here)  # type: ignore[index]
    return value


def _wide_mask(mask: Tensor, gaps: tuple[int, int, int]) -> Tensor:
    """A mask (B, T) of texts as (B, T + L), prompts being real words."""
    start, end = bounds(mask)
    return spread(gaps, mask.shape[1], start, start, end).fill(mask, 1)


def _held(given: Mapping[str, Any], length: int, size: int) -> int:
    """How many words, prompts among them, the cache holds that the stack goes on from."""
    _, cache = cache_in(given)
    words = words_in(cache)
    if words is not None and getattr(cache, "is_compileable", False):
        raise AdapterError(
            "a cache of fixed size has no room for a soft prompt; leave cache_implementation out"
        )
    if words is None and begun(cache):
        mask = given.get("attention_mask")
        return 1 + length if mask is None else mask.shape[1] + length - size
    return words or 0


def _shape(mask: object) -> str:
    return f"one of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"{type(mask)}"


def _ids_of(model: nn.Module) -> tuple[int, tuple[int, ...]]:
    """An id that means nothing special, and those that end a segment."""
    ids = special_ids(model)
    special = {i for value in ids.values() for i in value}
    ends = ids.get("sep_token_id") or ids.get("eos_token_id") or ()
    return next(i for i in range(len(special) + 1) if i not in special), ends
