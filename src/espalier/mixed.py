"""How rows of one batch on different adapters are computed, for any delta.

Rows with the same choice form a group. A host runs once on the whole batch; then the deltas of
each group act on the group's rows alone, as if these were the batch and the choice were active.
Only where trained copies stand in for a host's own parameters does the host run group by group.
Nobody but `esp.rows` (rows.py) makes one of these. B rows, T words, L extra keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.deltas import Batch, Call, Delta
from espalier.errors import AdapterError
from espalier.fast.grouped import Grouped, grouped
from espalier.pieces import Group, Live, Pieces, together, written
from espalier.seat import Seat, argument, first, instead

if TYPE_CHECKING:
    from espalier.attention import Attention
    from espalier.graft import Graft

# What says how many rows there are, the first that is given.
_TEXTS = (
    *("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds"),
    *("pixel_values", "input_features", "input_values", "attention_mask"),
)


class Mixed:
    """The rows of a batch on their adapters, while `esp.rows` holds.

    Attributes:
        choices: The live tuple of every row as it was given; generation may make several of one.
        lives: The different ones, in the order in which they come.
        rows: How many rows the batch that now runs has.
    """

    def __init__(self, graft: Graft, choices: Sequence[Live]) -> None:
        self.graft = graft
        self.choices = tuple(choices)
        self.lives = tuple(dict.fromkeys(choices))
        self.rows = len(choices)
        self.lengths: tuple[int, ...] = ()  # words in a row: flattened hosts see rows × words
        self.plans: dict[str, Grouped | None] = {}
        self.flats: list[Tensor] = []  # the numbers that plans were made from
        self.versions: list[int] = []
        self._groups: dict[tuple[int, torch.device], list[Group]] = {}

    # ------------------------------------------------------------------------------ which rows

    def tell(self, given: Mapping[str, Any]) -> None:
        """Note how many rows and words the model is given now.

        Raises:
            AdapterError: They are no multiple of the rows that were announced.
        """
        if (
            self.plans
            and not torch.compiler.is_compiling()
            and _versions(self.flats) != self.versions
        ):
            self.forget()
        texts = {name: v for name in _TEXTS if isinstance(v := given.get(name), Tensor)}
        if not texts:
            raise AdapterError(
                f"esp.rows cannot tell how many rows this model is given; it looks at "
                f"{', '.join(_TEXTS)}, by name"
            )
        name, first = next(iter(texts.items()))
        wide = 2 if name.endswith("embeds") else 1
        images = name in ("pixel_values", "input_features", "input_values")
        self.rows = len(first) if images else first.shape[: first.dim() - wide].numel()
        self.lengths = tuple(v.shape[1] for v in texts.values() if v.dim() > 1)
        if self.rows % len(self.choices):
            raise AdapterError(
                f"esp.rows was given {len(self.choices)} choices, but the model {self.rows} rows "
                f"({name}); give one choice for each row, None for the base alone"
            )

    def groups(self, size: int, device: torch.device) -> list[Group]:
        """Every group with its rows among `size`, which may be several for each choice."""
        known = self._groups.get((size, device))
        if known is None:
            each = size // len(self.choices)
            where: dict[Live, list[int]] = {live: [] for live in self.lives}
            for row, live in enumerate(self.choices):
                where[live].extend(range(row * each, (row + 1) * each))
            known = [Group(live, torch.tensor(rows, device=device)) for live, rows in where.items()]
            self._groups[size, device] = known
        return known

    def _size(self, x: Tensor, path: str) -> int:
        """How many rows of x there are: those of the batch, or a word in each (flattened).

        Raises:
            AdapterError: Rows cannot be told from what this host is given.
        """
        if len(x) in (1, self.rows):
            return self.rows
        if self._flattened(x):
            return len(x)
        raise AdapterError(
            f"{path} is given {tuple(x.shape)}, in which the {self.rows} rows of the batch cannot "
            "be told; esp.rows cannot serve an adapter there"
        )

    def _flattened(self, x: Tensor) -> bool:
        """Whether x has a word of the batch in each row; of a few words none says whose it is."""
        return x.dim() == 2 and len(x) in [self.rows * length for length in self.lengths]

    def begin(self, batch: Batch, stack: str | None) -> None:
        """Tell the deltas that mind it what their rows of the batch are given."""
        masks = [mask for mask in (batch.mask, batch.decoder_mask) if mask is not None]
        device = masks[0].device if masks else torch.device("cpu")
        for live, rows in self.groups(self.rows, device):
            pieces = Pieces(self.rows, rows)
            mine = batch._replace(
                mask=pieces.of(batch.mask), decoder_mask=pieces.of(batch.decoder_mask)
            )
            for name, _ in live:
                for delta in self.graft.adapters[name].told:
                    if stack in (None, delta.site.stack):
                        delta.begin(mine)

    # -------------------------------------------------------------------------------- in a seat

    def run(self, seat: Seat, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A host's output, its rows changed by the deltas of their adapters."""
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            plan = self._plan(seat)
            if plan is not None and plan.takes(args, kwargs):
                x = args[0]
                if len(x) == self.rows or self._flattened(x):
                    return plan.output(x, self.rows)
        live = [seat.acting(one) for one in self.lives]
        if not seat.watchers:
            changes = any(live)
            return self._changed(seat, live, args, kwargs) if changes else seat._inner(args, kwargs)
        try:
            result = self._changed(seat, live, args, kwargs) if any(live) else None
            result = seat._inner(args, kwargs) if result is None else result
            seat._tell([], args, kwargs, result)  # of all rows: `_alone` cuts it
            return result
        finally:
            for delta in seat._watching(within=True):
                delta.seen.clear()

    def _plan(self, seat: Seat) -> Grouped | None:
        """How the changes here are computed as one, if they can be."""
        if seat.path not in self.plans:
            if not self.plans:
                self.flats = [
                    f for n, _ in self.graft.live for f in self.graft.adapters[n].runs.values()
                ]
                self.versions = _versions(self.flats)
            self.plans[seat.path] = grouped(seat, self.choices)
        return self.plans[seat.path]

    def forget(self) -> None:
        """Make plans anew: numbers were moved or changed."""
        self.plans = {}

    def _changed(
        self,
        seat: Seat,
        live: list[list[tuple[Delta, float]]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        x = argument(args, kwargs)
        size = self._size(x, seat.path)
        groups = self.groups(size, x.device)
        mine = [(g, here, Pieces(size, g.rows)) for g, here in zip(groups, live, strict=True)]
        try:
            if any(delta.replaces for here in live for delta, _ in here):
                return self._apart(seat, mine, args, kwargs, size)
            args, kwargs = self._before(seat, mine, args, kwargs, size)
            result = seat._inner(args, kwargs)
            y = self._after(seat, mine, args, kwargs, first(result), size)
            return y if isinstance(result, Tensor) else (y, *result[1:])
        finally:
            for delta, _ in (pair for here in live for pair in here):
                delta.seen.clear()

    def _apart(
        self,
        seat: Seat,
        mine: list[tuple[Group, list[tuple[Delta, float]], Pieces]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        size: int,
    ) -> Tensor:
        """The host run group by group, each with the parameters that stand in for it."""
        parts = []
        for group, here, pieces in mine:
            with self._alone(group, here, pieces):
                given, named = pieces.of(args), pieces.of(kwargs)
                y = seat._changed(here, given, named) if here else seat._inner(given, named)
            parts.append(
                y if len(y) == len(group.rows) else y.expand(len(group.rows), *y.shape[1:])
            )
        return together(parts, [group.rows for group, _, _ in mine], size)

    def _before(
        self,
        seat: Seat,
        mine: list[tuple[Group, list[tuple[Delta, float]], Pieces]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        size: int,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the host is given, rows changed by the deltas that act before it."""
        x = argument(args, kwargs)
        changed: list[tuple[Tensor, Tensor]] = []
        for group, here, pieces in mine:
            acting = [pair for pair in here if type(pair[0]).before is not Delta.before]
            if acting:
                given, named = instead(pieces.of(x), args, kwargs)
                with self._alone(group, here, pieces):
                    for delta, weight in acting:
                        given, named = seat._before(delta, weight, given, named)
                changed.append((group.rows, argument(given, named)))
        if not changed:
            return args, kwargs
        return instead(written(x, changed, size), args, kwargs)

    def _after(
        self,
        seat: Seat,
        mine: list[tuple[Group, list[tuple[Delta, float]], Pieces]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        y: Tensor,
        size: int,
    ) -> Tensor:
        """The host's output, rows changed by the deltas that act after it."""
        x = argument(args, kwargs)
        changed: list[tuple[Tensor, Tensor]] = []
        for group, here, pieces in mine:
            acting = [pair for pair in here if type(pair[0]).after is not Delta.after]
            if acting:
                with self._alone(group, here, pieces):
                    own = pieces.of(y)
                    for delta, weight in acting:
                        if seat.path in delta.watches:
                            given, named = pieces.of(args), pieces.of(kwargs)
                            delta.seen[seat.path] = seat._call(here, given, named, own)
                        own = seat._after(delta, weight, pieces.of(x), own)
                changed.append((group.rows, own))
        return written(y, changed, size) if changed else y

    @contextmanager
    def _alone(
        self, group: Group, here: Iterable[tuple[Delta, float]], pieces: Pieces
    ) -> Iterator[None]:
        """Within it a group's rows are the batch and its adapters the live ones.

        What the deltas here have seen is cut to these rows, too.
        """
        graft = self.graft
        live = graft.live
        held = [(delta, delta.seen) for delta, _ in here if delta.seen]
        for delta, seen in held:
            delta.seen = {path: self._cut(path, call, group, pieces) for path, call in seen.items()}
        graft.live, graft.rows = group.live, None
        try:
            yield
        finally:
            graft.live, graft.rows = live, self
            for delta, seen in held:
                delta.seen = seen

    def _cut(self, path: str, call: Call, group: Group, pieces: Pieces) -> Call:
        seat = self.graft.seats[path]
        args, kwargs = pieces.of(call.args), pieces.of(call.kwargs)
        return seat._call(seat.acting(group.live), args, kwargs, pieces.of(call.y))

    # ---------------------------------------------------------------------- attention and words

    def attend(
        self, port: Attention, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Keys and values (B, h_kv, L, d_h) of the rows' deltas, and what is added to their scores.

        Rows with fewer than L of them have some that are hidden. The scores (B, 1, 1, L) are None
        where all are seen with the weight 1; all is None where there are no keys.
        """
        size = self._size(k, str(port))
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        groups = self.groups(size, k.device)
        for group in groups:
            pieces = Pieces(size, group.rows)
            deltas = [(d, w) for name, w in group.live for d in port.deltas.get(name, ())]
            mine = [pieces.of(one) for one in (q, k, v)]
            with self._alone(group, deltas, pieces):
                parts.append(_joined(list(port.extra(*mine)), *mine))
        for delta in (d for some in port.deltas.values() for d in some):
            delta.seen.clear()
        length = max(keys.shape[2] for keys, _, _ in parts)
        if not length:
            return None
        where = [group.rows for group in groups]
        keys, values, scores = (
            together(list(some), where, size)
            for some in zip(*(_filled(*part, length) for part in parts), strict=True)
        )
        even = all(p.shape[2] == length for p, _, _ in parts) and all(
            w == 1 for one in self.lives for name, w in one if name in port.deltas
        )
        return keys, values, None if even else scores[:, None, None]

    def embedded(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """Words (B, L, D) for every row of `like`, given those (L, D) of every group."""
        size = self._size(like, "the word embedding")
        groups = self.groups(size, like.device)
        wide = [one.expand(len(g.rows), -1, -1) for one, g in zip(parts, groups, strict=True)]
        return together(wide, [g.rows for g in groups], size)


def _versions(flats: list[Tensor]) -> list[int]:
    return [0 if flat.is_inference() else flat._version for flat in flats]


def _joined(
    extra: list[tuple[Tensor, Tensor, float]], q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """All keys, values and (L,) logarithms of weights of one group's rows; L may be 0."""
    keys = torch.cat([k[:, :, :0], *(keys for keys, _, _ in extra)], 2)
    values = torch.cat([v[:, :, :0], *(values for _, values, _ in extra)], 2)
    logs = [q.new_full((keys.shape[2],), weight).log() for keys, _, weight in extra]
    return keys, values, torch.cat([q.new_zeros(0), *logs])


def _filled(
    keys: Tensor, values: Tensor, logs: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and scores (B, L) with hidden ones up to the length."""
    more = length - keys.shape[2]
    hidden = torch.finfo(logs.dtype).min
    scores = F.pad(logs, (0, more), value=hidden).expand(len(keys), -1)
    return F.pad(keys, (0, 0, 0, more)), F.pad(values, (0, 0, 0, more)), scores
